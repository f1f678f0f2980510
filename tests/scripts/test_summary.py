"""What a run prints for people: totals in words, what a dry run would do, what to do next, and a question."""

from __future__ import annotations

import re
import shutil
import time

import pytest

from selfheal.scripts.summary import human_size
from tests.support.command_line import Done, Site
from tests.support.files import flip_a_bit, noise, write_file

SAME = "(with the same --directory and --database)"


def lines_of(done: Done) -> list[str]:
    """Return the lines on standard output, without the seconds of the summary."""
    return [re.sub(r" in [0-9.]+ s$", "", line) for line in done.out.splitlines()]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (15_600, "15.6 KB"),
        (999_949, "999.9 KB"),
        (999_950, "1.0 MB"),
        (1_887_436_800, "1.9 GB"),
        (5 * 10**15, "5,000.0 TB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    """A size has at most one decimal and the unit that a person would choose."""
    assert human_size(size) == text


def test_the_first_migration(site: Site) -> None:
    """The dry run names each file and says how to do it; the run itself says what to do next; a second run nothing."""
    write_file(site.directory / "cats/tom.jpg", bytes(15_000))
    write_file(site.directory / "a.png", bytes(600))
    dry = site.run("migrate", "--dry-run")
    assert sorted(lines_of(dry)[:2]) == ["a.png: it would be backed up", "cats/tom.jpg: it would be backed up"]
    assert lines_of(dry)[2:] == [
        "migrate (dry run, nothing was changed): 2 would be backed up · 15.6 KB",
        "next: the same command without --dry-run does this",
    ]
    assert lines_of(site.run("migrate")) == [
        "migrate: 2 backed up · 15.6 KB",
        f"next: `selfheal verify --drill` {SAME} proves that every file can be restored",
    ]
    assert lines_of(site.run("migrate")) == ["migrate: 2 already backed up · 15.6 KB"]


def test_the_flags_of_the_next_command(site: Site) -> None:
    """The next command needs no flag if disk and database are named by the environment."""
    write_file(site.directory / "a.png", b"a")
    env = {"SELFHEAL_DIRECTORY": str(site.directory), "SELFHEAL_DATABASE_URL": site.database}
    assert lines_of(site.run_without_flags("migrate", env=env))[1].startswith("next: `selfheal verify --drill` proves ")


def test_what_a_dry_restore_would_do(full_site: Site) -> None:
    """Each file that would be written, replaced or removed is named on its line, without control characters."""
    full_site.run("delete", "empty.gif")
    write_file(full_site.directory / "empty.gif", b"is back")
    write_file(full_site.directory / "a.png", b"other bytes")
    shutil.rmtree(full_site.directory / "cats")
    *plans, total, following = lines_of(full_site.run("restore", "--verify", "--dry-run"))
    assert sorted(plans) == [
        "a.png: the disk's bytes differ; they would be replaced, and kept as a version",
        "cats/tom.jpg: it would be restored",
        "empty.gif: it was deleted; its file would be removed",
    ]
    words = "2 would be restored, 1 already on disk, 1 deleted (files would be removed)"
    assert total == f"restore (dry run, nothing was changed): {words} · 529.4 KB"
    assert following == "next: the same command without --dry-run does this"


def test_what_a_dry_migration_would_replace(full_site: Site) -> None:
    """With `--prefer disk` a dry run names the files whose bytes would be taken."""
    write_file(full_site.directory / "a.png", b"other bytes")
    plan, total, _ = lines_of(full_site.run("migrate", "--prefer", "disk", "--dry-run"))
    assert plan == "a.png: its bytes in the database would be replaced"
    assert total.startswith("migrate (dry run, nothing was changed): 1 would be backed up, 3 already backed up · ")


@pytest.mark.parametrize("is_newer", [True, False], ids=["newer on disk", "older on disk"])
def test_the_same_advice_for_files_that_differ(full_site: Site, is_newer: bool) -> None:
    """`migrate` and `verify` say the same of a file that differs: which side is newer, and what keeps it."""
    full_site.run("migrate")  # makes the mark of this disk
    if is_newer:
        write_file(full_site.directory / "a.png", noise(6000, 1), modified_ns=time.time_ns())
    else:
        flip_a_bit(full_site.directory / "a.png")
    verified, migrated = full_site.run("verify"), full_site.run("migrate")
    assert verified.err == migrated.err
    side, command = ("disk's", "migrate --prefer disk") if is_newer else ("recorded", "restore --verify")
    assert verified.err.startswith(f"differs: a.png: the {side} bytes are newer than the ")
    assert f"`selfheal {command}`" in verified.err


@pytest.mark.parametrize("is_there", [True, False], ids=["empty", "missing"])
def test_an_empty_directory_is_questioned(full_site: Site, is_there: bool) -> None:
    """`verify` prints one question in place of a line for each name, with the same exit code and JSON."""
    shutil.rmtree(full_site.directory)
    if is_there:
        full_site.directory.mkdir()
    state = "is empty" if is_there else "does not exist"
    question = (
        f"question: the directory {full_site.directory} {state}, but the database has 4 names: is --directory right? "
        "`selfheal restore` brings them back\n"
    )
    done = full_site.run("verify")
    assert (done.code, done.err) == (1, question)
    assert lines_of(done)[0] == "verify: 4 missing on disk · 0 bytes"
    assert full_site.run("verify", "--quiet") == Done(1, "", question)
    report = full_site.run("verify", "--json").json
    assert (report["counts"], len(report["problems"])) == ({"missing_on_disk": 4}, 4)
    assert full_site.run("restore").err == ""


def test_a_migration_of_an_empty_directory_is_questioned(full_site: Site) -> None:
    """`migrate` asks too, and exits with 0; without a name in the database it does not ask."""
    empty = full_site.home / "empty"
    empty.mkdir()
    flags = ["--directory", str(empty), "--database", full_site.database]
    done = full_site.run_without_flags("migrate", *flags)
    assert (done.code, lines_of(done)) == (0, ["migrate: the tables are ready; there is no file to back up · 0 bytes"])
    assert done.err.startswith(f"question: the directory {empty} is empty, but the database has 4 names: ")
    assert full_site.run_without_flags("migrate", *flags, "--quiet") == Done(0, "", "")
    flags[-1] = f"sqlite:///{full_site.home}/new.db"
    for more in (["--dry-run"], []):
        assert full_site.run_without_flags("migrate", *flags, *more).err == ""


def test_a_directory_that_has_files_is_not_questioned(full_site: Site) -> None:
    """If one file is there, each missing name is one line."""
    shutil.rmtree(full_site.directory / "cats")
    done = full_site.run("verify")
    assert done.err == "missing_on_disk: cats/tom.jpg: `selfheal restore` brings it back\n"
