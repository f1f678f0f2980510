"""`selfheal save`, `delete`, `list`, `history`, `undo` and `purge`."""

from __future__ import annotations

import time

from selfheal.content.sources import CHUNK
from tests.support.command_line import IMAGES, Done, Site
from tests.support.disk_files import contents_below


def test_a_name_through_its_life(full_site: Site) -> None:
    """save, list, history, delete and undo change disk and database, and report it in JSON."""
    picture = full_site.home / "picture"
    picture.write_bytes(b"second")
    first = full_site.run("save", "new/x.png", "-", "--json", stdin=b"first" * CHUNK)
    assert (first.code, first.json["command"], first.json["ok"]) == (0, "save", True)
    assert (first.json["name"], first.json["size"], first.json["generation"]) == ("new/x.png", 5 * CHUNK, 1)
    assert (full_site.directory / "new/x.png").read_bytes() == b"first" * CHUNK
    second = full_site.run("save", "new/x.png", str(picture), "--json")
    assert (second.json["size"], second.json["generation"]) == (6, 2)

    listed = full_site.run("list", "--json")
    assert {one["name"]: one["size"] for one in listed.json["names"]} == {
        name: len(data) for name, data in (IMAGES | {"new/x.png": b"second"}).items()
    }
    lines = full_site.run("list").out.splitlines()
    assert [line.split()[-1] for line in lines] == sorted([*IMAGES, "new/x.png"])

    history = full_site.run("history", "new/x.png", "--json")
    assert (history.json["now"]["size"], [one["size"] for one in history.json["versions"]]) == (6, [5 * CHUNK])
    assert full_site.run("delete", "new/x.png", "a.png", "--json").json["deleted"] == ["new/x.png", "a.png"]
    assert not (full_site.directory / "new/x.png").exists()
    assert {one["name"] for one in full_site.run("list", "--deleted", "--json").json["names"]} == {"new/x.png", "a.png"}
    assert full_site.run("restore", "--json").json["counts"] == {"ok": 3}

    back = full_site.run("undo", "new/x.png", "--json")
    assert (back.code, back.json["size"]) == (0, 6)
    assert (full_site.directory / "new/x.png").read_bytes() == b"second"
    assert full_site.run("undo", "new/x.png", "--generation", "1").code == 0
    assert (full_site.directory / "new/x.png").read_bytes() == b"first" * CHUNK
    assert full_site.run("undo", "a.png").out.startswith("a.png is back")
    assert contents_below(full_site.directory) == IMAGES | {"new/x.png": b"first" * CHUNK}
    assert full_site.run("verify", "--drill").code == 0


def test_names_that_are_not_there(full_site: Site) -> None:
    """delete deletes the names that exist, reports the others and exits 1; undo and history report them too."""
    done = full_site.run("delete", "nope.png", "a.png")
    assert (done.code, done.out, done.err) == (1, "deleted a.png\n", "no such name: nope.png\n")
    report = full_site.run("delete", "nope.png", "empty.gif", "--json")
    assert (report.code, report.json) == (
        1,
        {"command": "delete", "ok": False, "deleted": ["empty.gif"], "missing": ["nope.png"]},
    )
    assert full_site.run("delete", "nope.png", "--quiet") == Done(1, "", "no such name: nope.png\n")
    for command in ("undo", "history"):
        done = full_site.run(command, "nope.png")
        assert (done.code, done.out) == (1, "")
        assert "'nope.png'" in done.error_line
        assert full_site.run(command, "nope.png", "--json").json["ok"] is False


def test_purge(full_site: Site) -> None:
    """purge drops versions older than --keep-days and says how many; with --dry-run it only says so."""
    full_site.run("save", "a.png", "-", stdin=b"newer")
    time.sleep(1.05 - time.time() % 1)  # until the next second: SQLite's clock has whole seconds
    kept = full_site.run("purge", "--json")
    assert kept.json == {"command": "purge", "ok": True, "versions": 0, "blobs": 0, "bytes": 0, "freed": 0}
    dry = full_site.run("purge", "--keep-days", "0", "--dry-run", "--json")
    assert (dry.json["versions"], dry.json["dry_run"]) == (1, True)
    assert full_site.run("purge", "--keep-days", "0", "--json").json["versions"] == 1
    assert full_site.run("history", "a.png", "--json").json["versions"] == []
    assert full_site.run("purge", "--keep-days", "0").out.startswith("dropped 0 old versions and 0 blobs")


def test_a_terminal_that_cannot_show_a_name(full_site: Site) -> None:
    """A name that the terminal's encoding lacks is shown escaped, and the command goes on."""
    done = full_site.execute(None, "list", *full_site.flags, PYTHONIOENCODING="latin-1")
    assert (done.code, len(done.out.splitlines())) == (0, len(IMAGES))
    assert "\\u65e5\\u672c.webp" in done.out
