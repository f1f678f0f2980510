"""Names of other apps become names in the grammar: the same one every time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfheal import names
from selfheal.bulk.foreign_names import to_name, with_digest

MAPPED = {
    "cats/tom.jpg": "cats/tom.jpg",
    "../x.png": "x.png",
    "a/../../b.png": "b.png",
    "a\\b.png": "a/b.png",
    "C:\\photos\\a.png": "photos/a.png",
    "/srv/app/a.png": "srv/app/a.png",
    "./a//b.png": "a/b.png",
    "https://cdn.example/media/a%20b.png?v=3#top": "media/a b.png",
    "http://[bad/a.png": "a.png",
    "s3://bucket/deep/a.png": "deep/a.png",
    "A.PNG": "A.PNG",
    "a.png. ": "a.png",
    ".hidden/.x": "_.hidden/_.x",
    "NUL.png": "_NUL.png",
    "aa::$DATA": "aa__$DATA",
    "a\x00b\n.png": "a_b_.png",
    "%2e%2e%2fx": "_2e_2e_2fx",
    "a\ufffdb.png": "a_b.png",
    "": "",
    "..": "",
    "/": "",
    None: "",
    b"cats/\xff.png": "cats/_.png",
    17: "17",
}


@pytest.mark.parametrize(("given_name", "name"), MAPPED.items(), ids=map(repr, MAPPED))
def test_names_of_other_apps(given_name: object, name: str) -> None:
    """URLs, paths of both kinds, and what the grammar excludes become names; nothing becomes the empty one."""
    assert to_name(given_name) == name
    assert not name or names.is_valid(name)


@given(st.one_of(st.text(max_size=60), st.text(alphabet="./\\:%2ef?#aAcCoOnN \x00$~", max_size=30)))
def test_any_text(text: str) -> None:
    """Whatever a column holds becomes a valid name or the empty one, and a valid name stays as it is."""
    name = to_name(text)
    assert not name or names.is_valid(name)
    assert to_name(name) == name
    assert not names.is_valid(text) or name == text


def test_too_long_names_are_not_cut() -> None:
    """A name that is too long stays too long: a part of it could be another one's."""
    assert not names.is_valid(to_name("../" + "x" * 300))
    assert not names.is_valid(to_name("/".join(["x" * 200] * 4)))


@pytest.mark.parametrize(
    ("name", "other"),
    [("a/tom.jpg", "a/tom-01234567.jpg"), ("tom", "tom-01234567"), ("a.b/tom", "a.b/tom-01234567")],
)
def test_a_second_name(name: str, other: str) -> None:
    """The name for other bytes keeps its folder and its extension."""
    assert with_digest(name, "0123456789abcdef") == other
