"""`selfheal migrate`, `verify` and `restore`: exit codes, JSON, what people see, and what is changed."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil

import pytest

from selfheal.content.sources import CHUNK
from tests.support.command_line import IMAGES, MODULES, PASSWORD, Done, Site
from tests.support.disk_files import contents_below
from tests.support.files import flip_a_bit, noise, own_files_below, snapshot_of, write_file

KEYS = {"command", "ok", "examined", "counts", "skipped", "bytes", "seconds", "problems"}


# -- output -----------------------------------------------------------------------------------------------------------


def test_the_three_modules(site: Site, database_url: str) -> None:
    """Each module is a program: migrate adopts, verify checks, restore writes; a second run of each changes nothing."""
    url = database_url.replace("postgresql+asyncpg://", "postgres://").replace("@", f":{PASSWORD}@")
    flags = ["--directory", str(site.directory), "--database", url]
    for name, data in IMAGES.items():
        write_file(site.directory / name, data)
    everything = {"examined": len(IMAGES), "bytes": sum(map(len, IMAGES.values())), "skipped": 0}
    everything |= {"problems": [], "ok": True}

    done = site.execute("migrate", *flags, "--json")
    assert (done.code, done.err, set(done.json)) == (0, "", KEYS)
    assert done.json | {"seconds": 0} == everything | {"command": "migrate", "counts": {"migrated": 4}, "seconds": 0}
    shutil.rmtree(site.directory)
    done = site.execute("verify", *flags, "--json")
    assert (done.code, done.err, set(done.json)) == (1, "", KEYS)
    assert (done.json["ok"], done.json["counts"]) == (False, {"missing_on_disk": 4})
    assert sorted(problem["name"] for problem in done.json["problems"]) == sorted(IMAGES)
    assert {tuple(sorted(problem)) for problem in done.json["problems"]} == {("detail", "name", "outcome")}
    done = site.execute("restore", *flags, "--json")
    assert (done.code, done.err, set(done.json)) == (0, "", KEYS)
    assert done.json | {"seconds": 0} == everything | {"command": "restore", "counts": {"restored": 4}, "seconds": 0}
    assert contents_below(site.directory) == IMAGES
    for command in MODULES:
        again = site.run_without_flags(*flags, "--json", command=command)
        assert (again.code, again.json["counts"], again.json["bytes"]) == (0, {"ok": 4}, everything["bytes"])


@pytest.mark.parametrize("command", MODULES)
def test_a_run_for_people(full_site: Site, command: str) -> None:
    """Without --json a run prints one line of summary on standard output; with --quiet it prints nothing."""
    done = full_site.run(command)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(rf"{command}: 4 (good|already backed up|already on disk) · 529.4 KB in [0-9.]+ s\n", done.out)
    assert done.out.count("\n") == 1
    assert full_site.run(command, "--quiet") == Done(0, "", "")


def test_problems_are_reported(full_site: Site) -> None:
    """Each wrong name is one line on standard error, quiet or not, without control characters, and exit 1."""
    flip_a_bit(full_site.directory / "a.png")
    (full_site.directory / "cats/tom.jpg").unlink()
    write_file(full_site.directory / "esc\x1b[2J\n.png", b"x")
    write_file(full_site.directory / os.fsdecode(b"\xff.png"), b"x")
    expected = {"a.png": "differs", "cats/tom.jpg": "missing_on_disk"}
    hostile = {"esc\x1b[2J\n.png": "invalid_name", "\udcff.png": "invalid_name"}

    verbose, quiet = full_site.run("verify"), full_site.run("verify", "--quiet")
    assert (verbose.code, quiet.code, quiet.out) == (1, 1, "")
    words = "verify: 2 good, 1 different on disk, 1 missing on disk, 2 skipped (not valid names) · 77 bytes in "
    assert verbose.out.startswith(words)
    assert "\nnext: `selfheal restore` (with the same --directory and --database) brings back " in verbose.out
    for done in (verbose, quiet):
        lines = done.err.splitlines()
        assert len(lines) == 4
        assert all(any(line.startswith(f"{outcome}: {name}: ") for line in lines) for name, outcome in expected.items())
        assert "\x1b" not in done.err
    report = full_site.run("verify", "--json")
    assert (report.code, report.err, report.json["ok"]) == (1, "", False)
    assert {one["name"]: one["outcome"] for one in report.json["problems"]} == expected | hostile
    assert report.json["counts"] == {"differs": 1, "invalid_name": 2, "missing_on_disk": 1, "ok": 2}
    assert all(one["detail"] for one in report.json["problems"])


def test_progress_only_on_a_terminal(full_site: Site) -> None:
    """Progress is shown on standard error, if that is a terminal and --quiet is not given; never on standard output."""
    for arguments, is_shown in ((("--json",), True), ((), True), (("--json", "--quiet"), False)):
        main, terminal = pty.openpty()
        try:
            done = full_site.run("verify", *arguments, terminal=os.ttyname(terminal))
            shown = os.read(main, 65536).decode() if select.select([main], [], [], 0)[0] else ""
        finally:
            os.close(main)
            os.close(terminal)
        assert ("verify" in shown) is is_shown, shown
        assert "Traceback" not in shown
        assert done.out.count("\n") == 1
        assert "\x1b" not in done.out


# -- options ----------------------------------------------------------------------------------------------------------


def test_restore_with_verify(full_site: Site) -> None:
    """`restore --verify` heals differing files: exit 0, their bytes are a version; in a second run all is ok."""
    write_file(full_site.directory / "a.png", b"bad")
    plain = full_site.run("restore", "--json")
    assert contents_below(full_site.directory) == IMAGES | {"a.png": b"bad"}, plain
    done = full_site.run("restore", "--verify", "--json")
    assert (done.code, done.json["counts"]) == (0, {"ok": 3, "restored": 1})
    assert contents_below(full_site.directory) == IMAGES
    (version,) = full_site.run("history", "a.png", "--json").json["versions"]
    assert (version["size"], version["reason"]) == (3, "other bytes than the recorded ones")
    assert full_site.run("restore", "--verify", "--json").json["counts"] == {"ok": 4}


def test_migrate_prefers_disk(full_site: Site) -> None:
    """`migrate` reports differing files and exits 1; with `--prefer disk` it takes their bytes and exits 0."""
    write_file(full_site.directory / "a.png", b"newer")
    done = full_site.run("migrate", "--json")
    assert (done.code, done.json["counts"]) == (1, {"differs": 1, "ok": 3})
    done = full_site.run("migrate", "--prefer", "disk", "--json")
    assert (done.code, done.json["counts"]) == (0, {"migrated": 1, "ok": 3})
    assert full_site.run("verify", "--drill", "--json").json["counts"] == {"ok": 4}


@pytest.mark.parametrize("command", ["migrate", "verify"])
def test_litter_and_links(full_site: Site, command: str) -> None:
    """Litter and links are counted in the summary and in the JSON: exit 0; one warning names the first link."""
    for name in (".htaccess", ".git/config", "cats/._tom.jpg", "Thumbs.db"):
        write_file(full_site.directory / name, b"litter")
    assert full_site.run(command).err == ""
    (full_site.directory / "link.png").symlink_to("a.png")
    (full_site.directory / "one.png").symlink_to("..")
    done = full_site.run(command)
    assert (done.code, done.out.count("\n")) == (0, 1)
    assert ", 6 left alone (dotfiles, litter, links, --exclude) · " in done.out
    assert done.err.startswith("warning: link.png: a symbolic link; ")
    assert done.err.endswith("(1 more like this)\n")
    assert full_site.run(command, "--quiet") == Done(0, "", "")
    report = full_site.run(command, "--json").json
    assert (report["ok"], report["examined"], report["counts"], report["skipped"]) == (True, 4, {"ok": 4}, 6)


def test_names_that_are_left_alone(full_site: Site) -> None:
    """`--exclude` can be given several times, to each run; an empty glob is bad usage."""
    (full_site.directory / "a.png").unlink()
    (full_site.directory / "cats/tom.jpg").unlink()
    flags = ("--exclude", "*.png", "--exclude", "cats/*", "--json")
    for command in MODULES:
        report = full_site.run(command, *flags).json
        assert (report["counts"], report["skipped"]) == ({"ok": 2}, 0 if command == "migrate" else 2)
        assert "globs" in full_site.run(command, "--exclude", "").error_line
    assert not (full_site.directory / "a.png").exists()


def test_a_file_that_is_still_written(site: Site) -> None:
    """Migrate waits for the seconds in the variable; a bad number there is one line and exit 2."""
    write_file(site.directory / "a.png", b"a")
    done = site.run("migrate", "--json", env={"SELFHEAL_SETTLED_AFTER": "1.5"})
    assert (done.code, done.json["counts"]) == (0, {"migrated": 1})
    assert done.json["seconds"] > 1
    for seconds in ("soon", "-1", "nan", "inf", "1e9"):
        done = site.run("migrate", env={"SELFHEAL_SETTLED_AFTER": seconds})
        assert (done.code, "number from 0 to 3600" in done.error_line) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("migrate", "--dry-run"),
        ("migrate", "--dry-run", "--prefer", "disk"),
        ("restore", "--dry-run"),
        ("restore", "--dry-run", "--verify"),
        ("verify",),
        ("verify", "--dry-run", "--drill"),
        ("list",),
        ("purge", "--dry-run", "--keep-days", "0"),
    ],
    ids=" ".join,
)
def test_what_changes_nothing(full_site: Site, arguments: tuple[str, ...]) -> None:
    """Dry runs, verify and list change no byte and no mtime, and remove no temporary file of a dead process."""
    write_file(full_site.directory / "new.png", b"new")
    write_file(full_site.directory / "a.png", b"other")
    (full_site.directory / "cats/tom.jpg").unlink()
    write_file(full_site.directory / f".selfheal-tmp/{'0' * 32}", b"left by a process that was killed")
    before = snapshot_of(full_site.home)
    done = full_site.run(*arguments, "--json")
    assert snapshot_of(full_site.home) == before
    assert done.json.get("dry_run", False) == ("--dry-run" in arguments)


def test_a_dry_migration_before_the_first(site: Site) -> None:
    """Without a SQLite file, `migrate --dry-run` reports what it would adopt and makes no file."""
    write_file(site.directory / "a.png", b"a")
    before = snapshot_of(site.home)
    done = site.run("migrate", "--dry-run", "--json")
    assert (done.code, done.json["counts"]) == (0, {"migrated": 1})
    assert snapshot_of(site.home) == before


# -- disks and limits -------------------------------------------------------------------------------------------------


def test_restore_makes_the_directory_and_sweeps(full_site: Site) -> None:
    """Restore makes a missing uploads directory, and removes temporary files of a killed process."""
    shutil.rmtree(full_site.home / "app")
    assert full_site.run("verify").code == 1
    assert not (full_site.home / "app").exists()
    assert full_site.run("restore").code == 0
    assert contents_below(full_site.directory) == IMAGES
    write_file(full_site.directory / f".selfheal-tmp/{'0' * 32}", b"left by a process that was killed")
    assert full_site.run("restore").code == 0
    assert own_files_below(full_site.directory) == []


def test_a_disk_that_takes_no_large_file(full_site: Site) -> None:
    """A file that the disk refuses is reported, exit 1, and leaves no temporary file; the others are restored."""
    shutil.rmtree(full_site.directory)
    done = full_site.run("restore", "--json", limits={"RLIMIT_FSIZE": CHUNK})
    assert (done.code, done.json["counts"]) == (1, {"restored": 3, "failed": 1})
    assert [problem["name"] for problem in done.json["problems"]] == ["cats/tom.jpg"]
    assert contents_below(full_site.directory) == {
        name: data for name, data in IMAGES.items() if name != "cats/tom.jpg"
    }
    assert full_site.run("restore", "--json").json["counts"] == {"ok": 3, "restored": 1}


def test_few_descriptors_are_enough(full_site: Site) -> None:
    """A run opens few files at once, however many uploads there are."""
    for index in range(300):
        write_file(full_site.directory / f"many/{index}.png", noise(10, index))
    assert full_site.run("migrate").code == 0
    shutil.rmtree(full_site.directory / "many")
    done = full_site.run("restore", "--json", limits={"RLIMIT_NOFILE": 256})
    assert (done.code, done.json["counts"]) == (0, {"ok": 4, "restored": 300})
