"""Ranges (RFC 9110, section 14): one range of bytes is answered, anything else gets the whole file."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfheal.http.headers import make_head
from tests.support.plans import MODIFIED_NS, plan


@given(size=st.integers(1, 2**40), first=st.integers(0, 2**41), last=st.integers(0, 2**41))
@settings(max_examples=300)
def test_any_range(size: int, first: int, last: int) -> None:
    """`first-last`, `first-` and `-last` are cut to the size; one past the end is 416, a reversed one is ignored."""
    head = make_head("a.png", MODIFIED_NS, size)
    closed = plan(head, size, (b"range", f"bytes={first}-{last}".encode()))
    if last < first:
        assert (closed.status, closed.start, closed.stop) == (200, 0, size)
    elif first >= size:
        assert (closed.status, closed.start, closed.stop) == (416, 0, 0)
    else:
        assert (closed.status, closed.start, closed.stop) == (206, first, min(last + 1, size))
    opened = plan(head, size, (b"range", f"bytes={first}-".encode()))
    assert (opened.status, opened.start, opened.stop) == ((206, first, size) if first < size else (416, 0, 0))
    if last:
        suffix = plan(head, size, (b"range", f"bytes=-{last}".encode()))
        assert (suffix.status, suffix.start, suffix.stop) == (206, max(0, size - last), size)


@pytest.mark.parametrize("value", ["0-0", "0-", "1-", "-1", "-0", "5-9", "9" * 20 + "-", "junk"])
def test_an_empty_file_has_no_range(value: str) -> None:
    """Every range of an empty file is answered with the whole of it, as other servers do: a 416 would be an error."""
    planned = plan(make_head("a.png", MODIFIED_NS, 0), 0, (b"range", f"bytes={value}".encode()))
    assert (planned.status, planned.start, planned.stop) == (200, 0, 0)


@pytest.mark.parametrize(("first", "last", "status"), [(30, 20, 200), (20, 20, 416), (20, 30, 416)])
def test_very_large_numbers(first: int, last: int, status: int) -> None:
    """Numbers of many digits behave as small ones: a reversed range is ignored, one past the end is 416."""
    for size in (100, 2**50):
        head = make_head("a.png", MODIFIED_NS, size)
        assert plan(head, size, (b"range", f"bytes={10**first}-{10**last}".encode())).status == status


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes=-", (200, 0, 100)),
        ("bytes=", (200, 0, 100)),
        ("bytes", (200, 0, 100)),
        ("items=0-9", (200, 0, 100)),
        ("bytes 0-9", (200, 0, 100)),
        ("bytes=0-9,20-29", (200, 0, 100)),
        ("bytes=1_0-2_0", (200, 0, 100)),
        ("bytes=+1-3", (200, 0, 100)),
        ("bytes=\xb2-3", (200, 0, 100)),
        ("bytes=a-b", (200, 0, 100)),
        ("bytes=20-19", (200, 0, 100)),
        ("bytes=020-19", (200, 0, 100)),
        ("bytes=-0", (416, 0, 0)),
        ("bytes=-00", (416, 0, 0)),
        ("bytes=100-", (416, 0, 0)),
        ("bytes=0-0", (206, 0, 1)),
        ("bytes=00-009", (206, 0, 10)),
        ("BYTES= 10-19\t", (206, 10, 20)),
        ("bytes=99-1000", (206, 99, 100)),
        (f"bytes=10-{10**30}", (206, 10, 100)),
        (f"bytes=-{10**30}", (206, 0, 100)),
        ("bytes=-1", (206, 99, 100)),
    ],
)
def test_every_form_of_a_range(value: str, expected: tuple[int, int, int]) -> None:
    """One range in ASCII digits is answered; malformed or several ranges, or another unit, get the whole file."""
    answer = plan(make_head("a.png", MODIFIED_NS, 100), 100, (b"range", value.encode("latin-1")))
    assert (answer.status, answer.start, answer.stop) == expected
