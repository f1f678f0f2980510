"""The grammar of names: what is refused, what is valid, and how a request path becomes a name."""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
import tracemalloc
import unicodedata
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from selfheal import InvalidName, UploadStore, names

PREFIX = "/static/uploads"

TRAVERSAL = ["..", "../x.png", "a/../b.png", "a/..", "./a.png", "a/./b.png", ".", "a/.", "..\\x.png", "a\\..\\b.png"]
ABSOLUTE = [
    "/etc/passwd",
    "//etc/passwd",
    "C:/Windows/win.ini",
    "c:evil.png",
    "a/C:/x.png",
    "\\\\server\\share\\x.png",
    "http://evil.example/x.png",
]
ENCODED_AGAIN = ["%2e%2e/x.png", "%2E%2E", "a%2fb.png", "a%2Fb.png", "%252f", "a%25252Fb.png", "%5cx.png", "x%00.png"]
CONTROLS = [
    "a\0.png",
    "a\n.png",
    "a\r\nX: y",
    "\t.png",
    "a\x1b[2J.png",
    "a\x7f.png",
    "a\x85.png",
    "a\x9f.png",
    "a\u2028b",
    "a\u2029b",
]
NO_ENCODING = ["\ufffd.png", "a\ufffd/b.png", "\ud800.png", "a\udcff.png"]
EMPTY_PARTS = ["", "/", "a//b.png", "a/", "a.png/", "/a.png", "/kitten.png", "kitten//kitten.png", "kitten/"]
DEVICES = [
    "CON",
    "con.png",
    "nul.png",
    "NUL",
    "Aux.tar.gz",
    "prn",
    "COM1",
    "com9.jpg",
    "LPT1.txt",
    "lpt0",
    "COM¹.png",
    "lpt³",
    "LPT².png",
    "CONIN$",
    "conout$.txt",
    "con .png",
    "cats/nul.png",
    "nul/x.png",
]
STREAMS = ["a::$DATA", "a.png::$DATA", "a:$I30:b", "dir::$INDEX_ALLOCATION/x.png"]
DOTS_AND_SPACES = ["a.", "a.png.", "a.png ", "a./b.png", "a /b.png", "a. .", " "]
HIDDEN = [".env", ".git/config", "a/.htaccess", ".png", "..."]
RESERVED = [
    names.OWN_PREFIX,
    f"{names.OWN_PREFIX}-x.tmp",
    f"{names.OWN_PREFIX}/quarantine/a.png",
    f"a/{names.OWN_PREFIX}.x",
]
TOO_LONG = ["a" * 256, "é" * 128, f"a/{'b' * 256}", "/".join(["a" * 102] * 5), "/".join(["猫" * 34] * 5)]
REFUSED = [
    *TRAVERSAL,
    *ABSOLUTE,
    *ENCODED_AGAIN,
    *CONTROLS,
    *NO_ENCODING,
    *EMPTY_PARTS,
    *DEVICES,
    *STREAMS,
    *DOTS_AND_SPACES,
    *HIDDEN,
    *RESERVED,
    *TOO_LONG,
]

LONGEST = "/".join([*["a" * 102] * 4, "a" * 100])
GOOD = [
    "tom.jpg",
    "cats/tom.jpg",
    "no extension",
    "my cat.jpg",
    "кот/三毛.png",
    "😀.png",
    unicodedata.normalize("NFC", "é.png"),
    unicodedata.normalize("NFD", "é.png"),
    "a (1).png",
    "a[1]{2}.png",
    "logo@2x.png",
    "100%.png",
    "100%25.png",
    "a%20b.png",
    "a%50b.png",
    "a%01b.png",
    "\uff21.png",
    "%.png",
    "a?b.png",
    "a#b.png",
    "a&b=c;d+e,f.png",
    "~tom",
    "-rf",
    "a..b.png",
    "a.tar.gz",
    "$DATA.png",
    "X",
    "12:30.png",
    "console.png",
    "com10.png",
    "comA.png",
    "nullable/auxiliary.png",
    "COM.png",
    "uploads_private/x.png",
    "a" * 255,
    "猫" * 85,
    LONGEST,
]

tricky = st.sampled_from(
    [".", "..", "/", "//", "%", "%2f", "%25", "\\", ":", " ", "con", "nul", "a", "é", "\0", "\ufffd"]
)
any_string = st.one_of(st.lists(st.one_of(tricky, st.characters()), max_size=12).map("".join), st.text(max_size=40))
part = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=60)
valid = st.lists(part, min_size=1, max_size=4).map("/".join).filter(names.is_valid)


def printable(name: str) -> str:
    """Return a name as part of a test's ID, without characters that break a shell or a report."""
    return quote(name, errors="backslashreplace")[:60]


def requested(raw: str, prefix: str = PREFIX) -> str | None:
    """Return the name for the target `raw` of a request line: decoded once, as uvicorn does."""
    return names.from_path(unquote(raw), prefix, raw.encode("ascii"))


@pytest.mark.parametrize("name", REFUSED, ids=printable)
def test_refused_names(name: str) -> None:
    """Names that trick a file system, a cache or a log are refused; the error shows the name and the reason."""
    assert not names.is_valid(name)
    with pytest.raises(InvalidName, match=r"is not a valid name: .") as caught:
        names.check(name)
    assert repr(name) in str(caught.value)
    assert caught.value.why == names.fault(name) != ""
    assert names.from_path(f"{PREFIX}/{name}", PREFIX) is None


@pytest.mark.parametrize("name", GOOD, ids=printable)
def test_good_names(name: str) -> None:
    """Spaces, Unicode, brackets, @2x and percent signs are valid: nothing is changed, and a request finds the name."""
    assert names.is_valid(name)
    assert names.fault(name) == ""
    assert names.check(name) == name
    assert names.from_path(f"{PREFIX}/{name}", PREFIX) == name
    assert requested(names.to_path(name, PREFIX)) == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it is empty"),
        ("a\0", "it holds a control character, a backslash or a character that no encoding carries"),
        ("\ud800" * 600, "it holds a control character, a backslash or a character that no encoding carries"),
        ("猫" * 171, "it is longer than 512 bytes"),
        ("%2e%2e/x", "it holds a dot, slash, backslash or NUL that was percent-encoded twice"),
        ("cats//tom.png", "a part of it is empty"),
        ("cats/.tom", "a part of it begins with a dot"),
        ("cats /tom", "a part of it ends with a dot or a space"),
        ("é" * 128, "a part of it is longer than 255 bytes"),
        ("cats/nul.png", "a part of it is the name of a device"),
        ("a::$DATA", "a part of it names a drive or an alternate stream"),
        ("cats/.tom/nul", "a part of it begins with a dot"),
    ],
    ids=printable,
)
def test_a_refusal_says_why(name: str, why: str) -> None:
    """The error names the rule that is broken; if several are, the first one from the left."""
    assert names.fault(name) == why
    with pytest.raises(InvalidName, match=f": {re.escape(why)}"):
        names.check(name)


def test_lengths_are_counted_in_bytes() -> None:
    """A part may have 255 bytes in UTF-8 and a name 512, not one more."""
    assert len(LONGEST.encode()) == 512
    assert names.is_valid(LONGEST)
    assert not names.is_valid(LONGEST + "a")
    assert names.is_valid("é" * 127 + "a")
    assert not names.is_valid("é" * 128)


def test_composed_and_decomposed_are_two_names() -> None:
    """NFC and NFD are two names: nothing is normalised."""
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert requested(names.to_path(composed, PREFIX)) == composed
    assert requested(names.to_path(decomposed, PREFIX)) == decomposed


@pytest.mark.parametrize("control", [chr(code) for code in [*range(0x20), *range(0x7F, 0xA0)]], ids=printable)
def test_every_control_character_is_refused(control: str) -> None:
    """No control character of ASCII or Latin-1 is valid anywhere in a name."""
    assert not any(names.is_valid(name) for name in (control, f"{control}a", f"a{control}", f"a/b{control}c.png"))


@given(st.one_of(valid, any_string))
@example("a/../../etc/passwd")
@settings(max_examples=200)
def test_every_valid_name_stays_inside(name: str) -> None:
    """A valid name, joined to a root and normalised, is unchanged and below the root."""
    assume(names.is_valid(name))
    root = "/srv/uploads"
    assert posixpath.normpath(posixpath.join(root, name)) == f"{root}/{name}"
    assert list(PurePosixPath(name).parts) == name.split("/")
    assert not any(part.startswith(names.OWN_PREFIX) for part in name.split("/"))


@given(any_string)
@settings(max_examples=300)
def test_all_functions_agree(name: str) -> None:
    """`fault`, `is_valid`, `check` and `from_path` agree on any string and raise nothing else."""
    good = names.is_valid(name)
    assert (names.fault(name) == "") == good
    assert names.from_path(f"{PREFIX}/{name}", PREFIX) == (name if good else None)
    try:
        assert names.check(name) is name
    except InvalidName:
        assert not good


@given(st.from_regex(names._PLAIN, fullmatch=True))
@settings(max_examples=100)
def test_simple_names_obey_every_rule(name: str) -> None:
    """The regular expression for simple names accepts nothing that a rule refuses."""
    assert names.fault(name) == ""


@given(valid)
@settings(max_examples=100)
def test_every_valid_name_can_be_a_file(name: str) -> None:
    """Every valid name can be a file, and a listing gives the same name."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        listed = [os.path.relpath(os.path.join(top, file), root) for top, _, files in os.walk(root) for file in files]
    assert listed == [name]


@given(valid, st.sampled_from([PREFIX, "/u", "/bilder öffentlich"]))
@settings(max_examples=300)
def test_to_a_path_and_back(name: str, prefix: str) -> None:
    """The path of a name is ASCII and valid in a URL; decoded once, it gives the same name."""
    path = names.to_path(name, prefix)
    assert re.fullmatch(r"(?:[A-Za-z0-9/_.~-]|%[0-9A-F]{2})+", path)
    assert requested(path, prefix) == name


@given(st.text(st.sampled_from("/.%25efcEFC0aux\\:"), max_size=24))
@settings(max_examples=500)
def test_no_encoding_gives_a_step_upwards(raw: str) -> None:
    """However a target is encoded, its name has no `..`, even if it is decoded again."""
    name = requested(f"{PREFIX}/{raw}")
    assume(name is not None)
    again = str(name)
    for _ in range(4):
        again = unquote(again)
        assert ".." not in again.replace("\\", "/").split("/")
        assert "\0" not in again
    assert again.count("/") == str(name).count("/")


@pytest.mark.parametrize(
    "raw",
    ["a%2fb.png", "a%2Fb.png", "..%2f..%2fetc/passwd", "a%252fb.png", "a%25252fb.png", "%2e%2e/x.png", "%5c..%5cx.png"],
)
def test_encoded_separators_are_refused(raw: str) -> None:
    """A percent-encoded slash, backslash or dot, encoded once or several times, gives no name."""
    assert requested(f"{PREFIX}/{raw}") is None


def test_an_encoded_slash_needs_the_raw_path() -> None:
    """`raw_path` tells `%2f` from `/`; without it, which ASGI allows, the decoded path is used."""
    assert names.from_path(f"{PREFIX}/a/b.png", PREFIX, b"/static/uploads/a%2fb.png") is None
    assert names.from_path(f"{PREFIX}/a/b.png", PREFIX, b"/static/uploads/a/b.png") == "a/b.png"
    assert names.from_path(f"{PREFIX}/a b/c.png", PREFIX, b"/static/uploads/a%20b/c.png") == "a b/c.png"
    assert names.from_path(f"{PREFIX}/a/b.png", PREFIX, None) == "a/b.png"


def test_bytes_that_are_no_text_are_refused() -> None:
    """`%ff` is no UTF-8: servers decode it to U+FFFD, which is refused."""
    assert requested(f"{PREFIX}/%ff.png") is None


@pytest.mark.parametrize(
    "path",
    [
        "/static/uploads_private/x.png",
        "/static/uploads-old/x.png",
        "/static/uploads.bak",
        "/static/uploadsx.png",
        "/static/uploads",
        "/static/uploads/",
        "/static/upload/x.png",
        "/STATIC/UPLOADS/x.png",
        "/other/static/uploads/x.png",
        "static/uploads/x.png",
        "//static/uploads/x.png",
        "",
    ],
)
def test_a_sibling_of_the_prefix_is_not_below_it(path: str) -> None:
    """A path that only begins with the prefix (`uploads_private`) gives no name (CVE-2023-29159)."""
    assert names.from_path(path, PREFIX) is None
    assert names.from_path(path, PREFIX, path.encode()) is None


@pytest.mark.parametrize("path", ["http://host/static/uploads/x.png", "https://host//static/uploads/x.png", "*"])
def test_absolute_urls_are_not_paths(path: str) -> None:
    """An absolute URL as path, which h11 passes on, gives no name."""
    assert names.from_path(path, PREFIX, path.encode()) is None


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_names_are_refused(name: str) -> None:
    """A name that is absolute, on POSIX or Windows, is refused: it would replace the root (CVE-2026-28414)."""
    assert not names.is_valid(name)
    assert requested(f"{PREFIX}/{name}".replace("\\", "%5c")) is None


@pytest.mark.parametrize("name", DEVICES)
def test_device_names_are_refused(name: str) -> None:
    """A device of Windows, with an extension, in a folder or in any case, is refused (CVE-2025-66221)."""
    assert not names.is_valid(name)


async def test_nothing_is_written_outside_the_root(sqlite_store: UploadStore, tmp_path: Path) -> None:
    """Saving, deleting or restoring a name with `..` raises and writes nothing (CVE-2021-45452)."""
    before = sorted(tmp_path.rglob("*"))
    for name in (*TRAVERSAL, *ABSOLUTE):
        for call in (sqlite_store.save(name, b"x"), sqlite_store.delete(name), sqlite_store.restore(name)):
            with pytest.raises(InvalidName):
                await call
    assert sorted(tmp_path.rglob("*")) == before
    assert await sqlite_store.database.count() == 0


def test_a_raw_path_has_a_maximal_length() -> None:
    """A raw path of more than 8,192 bytes gives no name, however short its decoded form is."""
    assert names.from_path(f"{PREFIX}/tom.png", PREFIX, b"a" * 8192) == "tom.png"
    assert names.from_path(f"{PREFIX}/tom.png", PREFIX, b"a" * 8193) is None


def test_long_paths_are_not_cached() -> None:
    """Paths that are too long to be names are not cached."""
    tracemalloc.start()
    try:
        for number in range(100):
            path = f"{PREFIX}/{number}-{'a' * 100_000}"
            assert names.from_path(path, PREFIX, path.encode()) is None
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 2_000_000
