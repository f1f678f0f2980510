"""Cases of RFC 9110, sections 8, 13 and 14: header lines of a request, and the answer that they must get."""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import formatdate

SIZE = 4096
"""The size in bytes of the file that the cases are about."""
SECONDS = 1_700_000_000
MODIFIED_NS = SECONDS * 10**9 + 123_456_789
"""The time of that file."""
HUGE = "9" * 20
DATES = {
    "modified": formatdate(SECONDS, usegmt=True),
    "before": formatdate(SECONDS - 1, usegmt=True),
    "after": formatdate(SECONDS + 1, usegmt=True),
    "future": "Sun, 06 Nov 2099 08:49:37 GMT",
}


@dataclass(frozen=True)
class Case:
    """Header lines, and the answer to a GET with them: its status, and the bytes of a 206."""

    title: str
    lines: tuple[str, ...]
    status: int
    part: tuple[int, int] = (0, SIZE)

    def headers(self, etag: str) -> list[tuple[str, str]]:
        """Return the header lines for a file with this ETag."""
        known = {**DATES, "etag": etag, "opaque": etag.strip('"')}
        return [
            (key, value.strip(" ").format(**known)) for key, _, value in (line.partition(":") for line in self.lines)
        ]


def _ranges(status: int, *values: str) -> list[Case]:
    return [Case(f"bytes={value}"[:60], (f"Range: bytes={value}",), status) for value in values]


def _part(value: str, start: int, stop: int) -> Case:
    return Case(f"bytes={value}"[:60], (f"Range: bytes={value}",), 206, (start, stop))


def _case(status: int, *lines: str, part: tuple[int, int] = (0, SIZE)) -> Case:
    return Case(" & ".join(lines)[:120], lines, status, part)


RANGES = [
    _part("0-0", 0, 1),
    _part("0-99", 0, 100),
    _part("100-199", 100, 200),
    _part("00100-00199", 100, 200),
    _part("0-", 0, SIZE),
    _part("1-", 1, SIZE),
    _part("4000-", 4000, SIZE),
    _part("4095-", 4095, SIZE),
    _part("4095-4095", 4095, SIZE),
    _part("0-4095", 0, SIZE),
    _part("0-4096", 0, SIZE),
    _part("4000-999999", 4000, SIZE),
    _part("-1", 4095, SIZE),
    _part("-100", 3996, SIZE),
    _part("-4096", 0, SIZE),
    _part("-4097", 0, SIZE),
    _part("-999999", 0, SIZE),
    # last positions and suffixes past the end are cut to it, however many digits they have (CVE-2017-7529)
    _part("0-9223372036854775807", 0, SIZE),
    _part(f"0-{HUGE}", 0, SIZE),
    _part(f"-{HUGE}", 0, SIZE),
    _part("0-" + "9" * 5000, 0, SIZE),
    *_ranges(416, "4096-", "4096-4096", "4096-9999", "5000-", "999999-", "-0", "-00", "9223372036854775807-"),
    *_ranges(416, "18446744073709551615-", "18446744073709551616-18446744073709551617", f"{HUGE}-", "9" * 5000 + "-"),
    # malformed, or not a range at all: ignored
    *_ranges(200, "", "-", "--", "a-b", "0", "0-a", "a-0", "5-2", "1-0", "0-1-2", "--1", "-1-2", "0--1", "-+1"),
    *_ranges(200, "0x0-0x9", "1_0-2_0", "+1-3", "1-+3", "1.0-2.0", "1e0-2e0", "0 -1", "0- 1", "0-1;", '"0-1"', "*"),
    *_ranges(200, "٠-٩", "²-³", "０-９", "0-９", "0-1\x0b", "0–9", "\u00a00-1", "NaN-", "inf-"),  # CVE-2025-69225
    # several ranges: the whole file (CVE-2011-3192, CVE-2025-62727)
    *_ranges(200, "0-1,3-4", "0-1, 3-4", "0-0,-1", "0-,0-,0-", "5000-,0-1", "0-1,5-2", ",".join(["0-"] * 100)),
    *_ranges(200, ",".join(["5-0"] + [f"5-{end}" for end in range(1300)]), ",".join(f"{at}-" for at in range(5000))),
    *_ranges(200, "-9223372036854775608,-9223372036854771713", "," * 60_000, "0-1" + "," * 60_000 + "2-3"),
    _case(206, "Range: BYTES=0-9", part=(0, 10)),
    _case(206, "Range: Bytes=-10", part=(SIZE - 10, SIZE)),
    *(_case(200, f"Range: {value}") for value in ("", "bytes", "=0-9", "0-9", "bytes 0-9", "bytes:0-9", "b=0-9")),
    *(_case(200, f"Range: {unit}=0-9") for unit in ("items", "seconds", "bytess", "byte", "none", "octets", "x-bytes")),
    _case(200, "Range: bytes=0-1", "Range: bytes=3-4"),
    _case(200, "Range: bytes=0-1", "Range: bytes=0-1"),
]  # fmt: skip

MALFORMED_DATES = (
    "", "garbage", "0", "-1", "1700000000", "Tue", "GMT", "2099-11-14T22:13:20Z", "2099-11-14", "14/11/2099",
    "Tue, 14 Nov 2099", "Tue, 14 Nov 2099 22:13:20", "Tue, 14 Nov 2099 22:13:20 +0100", "Tue, 14 Nov 2099 22:13:20 PST",
    "Tue, 14 Foo 2099 22:13:20 GMT", "Tue, 14 Nov 99999 22:13:20 GMT", "Tue, ²4 Nov 2099 22:13:20 GMT",
    "Tue, 32 Nov 2099 22:13:20 GMT", "Tue, 31 Feb 2099 22:13:20 GMT", "Tue, 14 Nov 2099 25:61:61 GMT",
    "Tue, ١٤ Nov 2099 22:13:20 GMT", "Tue, 14 Nov 2099 22:13:20 GMT, Tue, 14 Nov 2099 22:13:20 GMT", '"{opaque}"',
)  # fmt: skip
"""Values that are no HTTP dates; one in 2099 would be later than the file if it were read as a date."""

CONDITIONS = [
    _case(200, "Accept: image/*", "Accept-Encoding: gzip, br", "X-Unknown: 1"),
    # If-None-Match: weak comparison
    _case(304, "If-None-Match: {etag}"),
    _case(304, "If-None-Match: W/{etag}"),
    _case(304, "If-None-Match: *"),
    _case(304, 'If-None-Match: "a", {etag}'),
    _case(304, 'If-None-Match: "a",{etag},"b"'),
    _case(304, 'If-None-Match: W/"a" , W/{etag}'),
    _case(304, 'If-None-Match: "a, b", {etag}'),
    _case(304, 'If-None-Match: "", {etag}'),
    _case(304, "If-None-Match: " + '"x", ' * 2000 + "{etag}"),
    _case(304, 'If-None-Match: "a"', "If-None-Match: {etag}"),
    _case(200, 'If-None-Match: "a"'),
    _case(200, 'If-None-Match: "a", W/"b"'),
    _case(200, "If-None-Match:"),
    _case(200, 'If-None-Match: ""'),
    _case(200, "If-None-Match: {opaque}"),
    _case(200, 'If-None-Match: "{opaque}-gzip"'),
    _case(200, 'If-None-Match: "x{opaque}"'),
    _case(200, 'If-None-Match: "a,{opaque}"'),
    _case(200, 'If-None-Match: "a"', 'If-None-Match: "b"'),
    # If-Modified-Since, in the three formats of a date
    _case(304, "If-Modified-Since: {modified}"),
    _case(304, "If-Modified-Since: {after}"),
    _case(304, "If-Modified-Since: {future}"),
    _case(304, "If-Modified-Since: Tuesday, 14-Nov-23 22:13:20 GMT"),
    _case(304, "If-Modified-Since: Tue Nov 14 22:13:20 2023"),
    _case(304, "If-Modified-Since: Sat Dec  2 08:49:37 2023"),
    _case(200, "If-Modified-Since: {before}"),
    _case(200, "If-Modified-Since: Tuesday, 14-Nov-23 22:13:19 GMT"),
    _case(200, "If-Modified-Since: Tue Nov 14 22:13:19 2023"),
    _case(200, "If-Modified-Since: Sun Nov  6 08:49:37 1994"),
    _case(200, "If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT"),
    _case(200, "If-Modified-Since: {future}", "If-Modified-Since: {future}"),
    *(_case(200, f"If-Modified-Since: {date}") for date in MALFORMED_DATES),
    # If-None-Match takes precedence over If-Modified-Since
    _case(200, 'If-None-Match: "a"', "If-Modified-Since: {modified}"),
    _case(304, "If-None-Match: {etag}", "If-Modified-Since: {before}"),
    # If-Match: strong comparison
    _case(200, "If-Match: {etag}"),
    _case(200, "If-Match: *"),
    _case(200, 'If-Match: "a", {etag}'),
    _case(200, 'If-Match: "a"', "If-Match: {etag}"),
    _case(412, 'If-Match: "a"'),
    _case(412, 'If-Match: "a", "b"'),
    _case(412, "If-Match: W/{etag}"),
    _case(412, 'If-Match: "a", W/{etag}'),
    _case(412, 'If-Match: "a,{opaque}"'),
    # If-Unmodified-Since
    _case(200, "If-Unmodified-Since: {modified}"),
    _case(200, "If-Unmodified-Since: {after}"),
    _case(200, "If-Unmodified-Since: Tuesday, 14-Nov-23 22:13:20 GMT"),
    _case(200, "If-Unmodified-Since: Tue Nov 14 22:13:20 2023"),
    _case(412, "If-Unmodified-Since: {before}"),
    _case(412, "If-Unmodified-Since: Tuesday, 14-Nov-23 22:13:19 GMT"),
    _case(412, "If-Unmodified-Since: Sun Nov  6 08:49:37 1994"),
    *(_case(200, f"If-Unmodified-Since: {date.replace('2099', '1999')}") for date in MALFORMED_DATES),
    # the order of section 13.2.2
    _case(200, "If-Match: {etag}", "If-Unmodified-Since: {before}"),
    _case(412, 'If-Match: "a"', "If-Unmodified-Since: {after}"),
    _case(412, 'If-Match: "a"', "If-None-Match: {etag}"),
    _case(412, "If-Unmodified-Since: {before}", "If-None-Match: {etag}"),
    _case(304, "If-Match: {etag}", "If-None-Match: {etag}"),
    _case(304, "If-Unmodified-Since: {after}", "If-Modified-Since: {after}"),
    # conditions with ranges
    _case(304, "If-None-Match: {etag}", "Range: bytes=0-9"),
    _case(304, "If-None-Match: {etag}", "Range: bytes=9999-"),
    _case(304, "If-Modified-Since: {modified}", "Range: bytes=0-9"),
    _case(412, 'If-Match: "a"', "Range: bytes=0-9"),
    _case(412, 'If-Match: "a"', "Range: bytes=9999-"),
    _case(412, "If-Unmodified-Since: {before}", "Range: bytes=0-9"),
    _case(206, 'If-None-Match: "a"', "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Modified-Since: {before}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Match: {etag}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Unmodified-Since: {modified}", "Range: bytes=-9", part=(SIZE - 9, SIZE)),
    # If-Range: strong, and exact
    _case(206, "If-Range: {etag}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "If-Range: {modified}", "Range: bytes=0-9", part=(0, 10)),
    _case(206, "Range: bytes=0-9", "If-Range: {etag}", part=(0, 10)),
    _case(416, "If-Range: {etag}", "Range: bytes=9999-"),
    _case(200, 'If-Range: "a"', "Range: bytes=0-9"),
    _case(200, 'If-Range: "a"', "Range: bytes=9999-"),
    _case(200, "If-Range: W/{etag}", "Range: bytes=0-9"),
    _case(200, "If-Range: {opaque}", "Range: bytes=0-9"),
    _case(200, 'If-Range: "a", {etag}', "Range: bytes=0-9"),
    _case(200, "If-Range: *", "Range: bytes=0-9"),
    _case(200, "If-Range:", "Range: bytes=0-9"),
    _case(200, "If-Range: {before}", "Range: bytes=0-9"),
    _case(200, "If-Range: {after}", "Range: bytes=0-9"),
    _case(200, "If-Range: {future}", "Range: bytes=0-9"),
    _case(200, "If-Range: garbage", "Range: bytes=0-9"),
    _case(200, "If-Range: {etag}"),
    _case(200, 'If-Range: "a"'),
    _case(200, "If-Range: {etag}", "Range: bytes=0-1,3-4"),
    _case(304, "If-Range: {etag}", "Range: bytes=0-9", "If-None-Match: {etag}"),
    _case(412, "If-Range: {etag}", "Range: bytes=0-9", 'If-Match: "a"'),
]
CASES = [*RANGES, *CONDITIONS]

WITH_STATIC_FILES = [
    _case(200),
    _case(304, "If-None-Match: {etag}"),
    _case(304, "If-None-Match: W/{etag}"),
    _case(304, 'If-None-Match: "a", {etag}'),
    _case(200, 'If-None-Match: "a"'),
    _case(304, "If-Modified-Since: {modified}"),
    _case(304, "If-Modified-Since: {after}"),
    _case(200, "If-Modified-Since: {before}"),
    _part("0-99", 0, 100),
    _part("4000-", 4000, SIZE),
    _part("-100", 3996, SIZE),
    _part("0-999999", 0, SIZE),
    *_ranges(416, "4096-", "5000-5001"),
    _case(206, "If-Range: {etag}", "Range: bytes=0-9", part=(0, 10)),
    _case(200, 'If-Range: "a"', "Range: bytes=0-9"),
]
"""Cases that Starlette's `StaticFiles` answers in the same way."""
