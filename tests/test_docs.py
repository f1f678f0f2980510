"""The documentation describes the commands completely and correctly."""

from __future__ import annotations

import json
import re
import shlex

import click
import pytest

from selfheal.bulk.outcomes import Outcome
from selfheal.scripts.cli import selfheal
from selfheal.scripts.reporting import Report
from tests.support import ROOT

COMMANDS = (ROOT / "docs" / "commands.md").read_text()
README = (ROOT / "README.md").read_text()
RUNS = ("migrate", "verify", "restore")
GROUPS = {
    "Every command": tuple(selfheal.commands),
    "Every command but serve": tuple(name for name in selfheal.commands if name != "serve"),
    "The three runs": RUNS,
}


def sections(text: str) -> dict[str, str]:
    """Return the text below each heading, up to the next one."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def table(section: str) -> dict[str, str]:
    """Return the first table of a section: the second cell by the first."""
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): second for first, second, *_ in cells}


def fences(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def heading(name: str) -> str:
    """Return the heading of a command: its usage."""
    arguments = [one for one in selfheal.commands[name].params if isinstance(one, click.Argument)]
    return f"`{' '.join(['selfheal', name, *(one.metavar or str(one.name).upper() for one in arguments)])}`"


def options(name: str) -> dict[str, click.Option]:
    """Return the flags of a command by their names."""
    return {one.opts[0]: one for one in selfheal.commands[name].params if isinstance(one, click.Option)}


def documented(name: str) -> dict[str, str]:
    """Return the flags that the document lists for a command: in its own section and in shared ones."""
    found = sections(COMMANDS)
    rows = table(found[heading(name)])
    for group, members in GROUPS.items():
        if name in members:
            rows |= table(found[group])
    return rows


def test_every_command_has_its_section() -> None:
    """The document has a section for each command, with its arguments, and no other."""
    written = {title for title in sections(COMMANDS) if title.startswith("`selfheal ")}
    assert written == {heading(name) for name in selfheal.commands}


@pytest.mark.parametrize("name", sorted(selfheal.commands))
def test_a_command_is_described_as_in_its_help(name: str) -> None:
    """The section of a command begins with its help text."""
    text = " ".join(sections(COMMANDS)[heading(name)].split())
    assert text.startswith(" ".join((selfheal.commands[name].help or "?").split()))


@pytest.mark.parametrize("name", sorted(selfheal.commands))
def test_every_flag_is_documented_with_its_help(name: str) -> None:
    """The document lists the flags of each command, with help text and default, and no others."""
    written = {flag.split()[0]: (flag, text) for flag, text in documented(name).items()}
    flags = options(name)
    assert written.keys() == flags.keys()
    for flag, option in flags.items():
        typed, text = written[flag]
        assert (len(typed.split()) == 1) is option.is_flag, f"{flag}: does it take a value?"
        default = f" Default: {option.default}." if option.show_default else ""
        assert text == f"{option.help}{default}"


@pytest.mark.parametrize("name", sorted(selfheal.commands))
def test_the_help_of_a_command(name: str) -> None:
    """The help has an example that parses, a default for each flag that takes a value, and no sentence is cut."""
    command = selfheal.commands[name]
    text = command.get_help(click.Context(command, info_name=name, terminal_width=80, max_content_width=80))
    assert "..." not in text.partition("\n")[2]
    example = re.search(rf"\n  Example:\n    selfheal {name} (.+)$", text)
    assert example, "give the command an `epilog=example(…)`"
    command.make_context(name, shlex.split(example[1]), resilient_parsing=True)  # its files need not exist
    for flag, option in options(name).items():
        if not option.is_flag and flag not in ("--app", "--exclude"):  # these have none
            assert option.show_default or " Default: " in str(option.help), flag


def test_the_list_of_commands() -> None:
    """`selfheal --help` lists each command with its whole first sentence."""
    text = " ".join(selfheal.get_help(click.Context(selfheal, info_name="selfheal", max_content_width=80)).split())
    for name, command in selfheal.commands.items():
        first = re.match(r"(.+?)\.( |$)", " ".join((command.help or "?").split()))
        assert first
        assert f" {name} {first[1]}" in text


def test_help_and_version_are_documented() -> None:
    """The flags that click adds are documented too."""
    for flag in ("`-h`", "`--help`", "`selfheal --version`"):
        assert flag in COMMANDS


def test_every_module_is_named() -> None:
    """The document names the module of each of the three bulk runs, and each exists."""
    modules = re.findall(r"`python -m selfheal\.scripts\.(\w+)`", COMMANDS)
    assert modules == ["migrate_images", "test_image_storage", "restore_images"]
    assert all((ROOT / "selfheal" / "scripts" / f"{module}.py").is_file() for module in modules)


def test_the_exit_codes() -> None:
    """The five exit codes are documented."""
    assert list(table(sections(COMMANDS)["Exit codes"])) == ["0", "1", "2", "3", "130"]


def test_the_outcomes() -> None:
    """The outcomes in the document are those of the code."""
    assert list(table(sections(COMMANDS)["The JSON"])) == [outcome.value for outcome in Outcome]


def test_the_json_example() -> None:
    """The JSON example has the keys that a run prints."""
    (example,) = (json.loads(block) for block in fences(COMMANDS, "json"))
    assert list(example) == list(Report("verify").as_json())
    assert {tuple(problem) for problem in example["problems"]} == {("name", "outcome", "detail")}
    assert {*example["counts"], *(one["outcome"] for one in example["problems"])} <= {one.value for one in Outcome}
    assert sum(example["counts"].values()) == example["examined"]


def test_the_environment() -> None:
    """The document lists the variables that the settings read, and no page names another."""
    source = (ROOT / "selfheal" / "settings.py").read_text()
    read = set(re.findall(r'environ\.get\("(\w+)"\)', source))
    assert set(table(sections(COMMANDS)["The environment"])) == read
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert set(re.findall(r"\bSELFHEAL_[A-Z_]+\b", page.read_text())) <= read, page.name


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_readme_shows_how_to_begin(target: str) -> None:
    """The README shows `make demo` and `make test`, and the Makefile has them."""
    assert any(re.search(rf"^make {target}\b", block, re.MULTILINE) for block in fences(README, "\\w*"))
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
