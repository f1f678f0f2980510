"""The command line: flags, environment and defaults, help, and the packages that commands need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import selfheal
from tests.support.command_line import MODULES, SECONDS, Done, Site, environment
from tests.support.files import write_file

# -- flags, environment and defaults ----------------------------------------------------------------------------------


def test_the_environment_and_the_flags(full_site: Site, tmp_path: Path) -> None:
    """Our variables win over DATABASE_URL, and flags win over variables, even over invalid ones."""
    empty = f"sqlite+aiosqlite:///{tmp_path}/empty.db"
    missing = str(tmp_path / "nowhere" / "else")
    found, nothing = {"ok": 4}, {"missing_on_disk": 4}

    def verify(*flags: str, **env: str) -> Done:
        return full_site.run_without_flags("verify", "--json", *flags, cwd=tmp_path / "nowhere", env=env)

    (tmp_path / "nowhere").mkdir()
    both = {"SELFHEAL_DIRECTORY": str(full_site.directory), "SELFHEAL_DATABASE_URL": full_site.database}
    assert verify(**both).json["counts"] == found
    assert verify(SELFHEAL_DIRECTORY=str(full_site.directory), DATABASE_URL=full_site.database).json["counts"] == found
    assert verify(**both, DATABASE_URL=empty).json["counts"] == found
    assert verify(**both | {"SELFHEAL_DATABASE_URL": ""}, DATABASE_URL=full_site.database).json["counts"] == found
    assert verify("--directory", missing, **both).json["counts"] == nothing
    assert verify("--database", empty, **both).code == 3
    bad = {"SELFHEAL_DIRECTORY": "/", "SELFHEAL_DATABASE_URL": "oracle://x", "DATABASE_URL": "mysql://x"}
    assert verify(*full_site.flags, **bad).json["counts"] == found
    assert verify("--directory", str(full_site.directory), **bad).code == 2
    assert verify(*full_site.flags, SELFHEAL_PREFIX="no-slash").code == 2
    assert list((tmp_path / "nowhere").iterdir()) == []


def test_the_defaults(site: Site) -> None:
    """By default the uploads are in app/static/uploads and the database in selfheal.db."""
    write_file(site.home / "app/static/uploads" / "a.png", b"a")
    assert site.run_without_flags("migrate", "--json").json["counts"] == {"migrated": 1}
    assert (site.home / "selfheal.db").is_file()
    assert site.run_without_flags("verify").code == 0


# -- packages ---------------------------------------------------------------------------------------------------------


WITHOUT_MODULE = "import sys; sys.modules[{module!r}] = None"


@pytest.mark.parametrize(
    ("command", "arguments", "module", "extra"),
    [
        ("migrate", [], "click", "cli"),
        (None, ["--help"], "click", "cli"),
        (None, ["serve"], "uvicorn", "server"),
        (None, ["list", "--database", "postgres://x@127.0.0.1:1/x"], "asyncpg", "postgres"),
    ],
    ids=["module without click", "command without click", "without uvicorn", "without asyncpg"],
)
def test_without_an_extra(site: Site, command: str | None, arguments: list[str], module: str, extra: str) -> None:
    """If a package of an extra is missing, one line names the extra that installs it; exit 2."""
    (site.home / "sitecustomize.py").write_text(WITHOUT_MODULE.format(module=module))
    done = site.execute(command, *arguments, PYTHONPATH=str(site.home), PYTHONDONTWRITEBYTECODE="1")
    assert (done.code, done.out) == (2, "")
    assert f"'{module}'" in done.error_line
    assert f"pip install 'selfheal-uploads[{extra}]'" in done.error_line


@pytest.mark.parametrize("module", ["sqlalchemy.dialects.postgresql", "uvicorn"])
def test_a_run_imports_only_what_it_uses(full_site: Site, module: str) -> None:
    """A bulk run over SQLite imports no server and no other database's dialect: that would be a tenth of its start."""
    (full_site.home / "sitecustomize.py").write_text(WITHOUT_MODULE.format(module=module))
    done = full_site.execute("verify", *full_site.flags, PYTHONPATH=str(full_site.home), PYTHONDONTWRITEBYTECODE="1")
    assert (done.code, done.err) == (0, "")


# -- help, version and collection -------------------------------------------------------------------------------------


def test_without_a_command_it_prints_its_help(site: Site) -> None:
    """`selfheal` alone, and `python -m selfheal`, print the help; the version is that of the distribution."""
    done = site.run_without_flags()
    assert done.code == 0
    assert done.out.startswith("Usage: selfheal")
    module = subprocess.run([sys.executable, "-m", "selfheal", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == f"selfheal, version {selfheal.__version__}\n"


def test_help_and_version(site: Site) -> None:
    """-h and --help print help on standard output and exit 0, for the command and for every module."""
    for flag in ("-h", "--help"):
        for command in (None, *MODULES):
            done = site.run_without_flags(flag, command=command)
            assert (done.code, done.err) == (0, "")
            assert "Usage:" in done.out
    done = site.run_without_flags("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("selfheal, version ")


def test_pytest_does_not_collect_the_script(pytestconfig: pytest.Config) -> None:
    """`test_image_storage.py` is a script: a `pytest` without paths does not collect it.

    The other tests are left out, because their imports take long.
    """
    scripts = Path(__file__).parent
    ignored = [f"--ignore={path}" for path in scripts.parent.iterdir() if path.is_dir() and path != scripts]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:randomly",
            f"--ignore-glob={scripts.parent}/test_*.py",
            *ignored,
        ],
        cwd=pytestconfig.rootpath,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert f"{Path(__file__).name}::test_help_and_version" in done.stdout, done.stdout + done.stderr
    assert "test_image_storage" not in done.stdout + done.stderr
    assert "selfheal/scripts" not in done.stdout + done.stderr
