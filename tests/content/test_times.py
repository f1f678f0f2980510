"""Times that are out of range."""

from __future__ import annotations

import pytest

from selfheal.content.times import clamp_ns


@pytest.mark.parametrize(
    ("modified_ns", "clamped"),
    [
        (0, 0),
        (-1, -1),
        (2**63 - 1, 2**63 - 1),
        (2**63, 2**63 - 1),
        (10**30, 2**63 - 1),
        (-(2**63), -(2**63)),
        (-(2**63) - 1, -(2**63)),
        (-(10**30), -(2**63)),
    ],
)
def test_a_time_is_clamped_to_64_bits(modified_ns: int, clamped: int) -> None:
    """A time in range stays as it is; any other becomes the nearest one that a record can hold."""
    assert clamp_ns(modified_ns) == clamped
