"""How selfheal is packaged: its name beside another project's, its source distribution, its lowest requirements."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from packaging.version import Version

from selfheal.distribution import DISTRIBUTION
from tests.support import ROOT, environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def installed(site: Path, *others: str) -> Path:
    """A directory of installed packages: selfheal, and the metadata of `others`."""
    shutil.copytree(ROOT / "selfheal", site / "selfheal", ignore=shutil.ignore_patterns("__pycache__"))
    for other in others:
        (site / other).mkdir()
        (site / other / "METADATA").write_text("Metadata-Version: 2.1\n")
    return site


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages in `site`, before those of this process."""
    paths = environment()["PYTHONPATH"]
    return subprocess.run(
        [sys.executable, *arguments], env=environment(PYTHONPATH=f"{site}:{paths}"), cwd=site,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("other", ["selfheal-1.0.2.dist-info", "selfheal-1.0.2-py3.11.egg-info"])
def test_the_other_project_beside_ours(tmp_path: Path, other: str) -> None:
    """If the project named `selfheal` is installed too, the import says so in one line, with the way out."""
    site = installed(tmp_path / "site", "selfheal_uploads-0.1.0.dist-info", other)
    done = run(site, "-c", "import selfheal; from selfheal import UploadStore; print(selfheal.__file__)")
    assert done.stdout == f"{site}/selfheal/__init__.py\n"
    (line,) = done.stderr.splitlines()
    assert "`pip uninstall selfheal`" in line
    assert f"--force-reinstall --no-deps {DISTRIBUTION}`" in line


def test_the_other_project_over_ours(tmp_path: Path) -> None:
    """If the other project was installed last, with its `__init__.py`, our commands and modules say so all the same."""
    site = installed(tmp_path / "site", "selfheal-1.0.2.dist-info")
    (site / "selfheal" / "__init__.py").write_text("class FunctionDebugger: ...\n")
    for arguments in (["-c", "import selfheal.store"], ["-m", "selfheal.scripts.migrate_images", "--help"]):
        done = run(site, *arguments)
        assert done.returncode == 0
        (line,) = done.stderr.splitlines()
        assert "`pip uninstall selfheal`" in line


def test_our_own_name_is_no_other_project(tmp_path: Path) -> None:
    """Without the other project nothing is said."""
    site = installed(tmp_path / "site", "selfheal_uploads-0.1.0.dist-info", "selfhealing-2.0.dist-info")
    assert run(site, "-c", "import selfheal; selfheal.UploadStore").stderr == ""


# -- what is published -------------------------------------------------------------------------------------------------


def test_the_source_distribution_is_complete(tmp_path: Path) -> None:
    """The source distribution holds every file of the repository: all that its tests, commands and pages need."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tarfile.open(next(iter(SdistBuilder(str(ROOT)).build(directory=str(tmp_path))))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {file for file in files.split("\0") if (ROOT / file).is_file()} - held == set()


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    """`tests/lowest.txt` pins each requirement of a user to the lowest version that `pyproject.toml` admits."""
    wanted = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    floors = dict(re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", one).groups() for one in wanted)  # type: ignore[union-attr]
    pins = dict(line.split("==") for line in (ROOT / "tests" / "lowest.txt").read_text().splitlines() if "==" in line)
    assert {name: Version(pins[name]) for name in floors} == {name: Version(floor) for name, floor in floors.items()}


def test_the_project_links_to_its_pages() -> None:
    """An index shows where the source, the documentation, the changes and the issues are."""
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} == set(PROJECT["urls"])
