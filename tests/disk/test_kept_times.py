"""The rounding of times by a disk is learned from times that were set and read back."""

from __future__ import annotations

from random import Random

import pytest

from selfheal.disk.kept_times import KeptTimes

SECOND = 1_000_000_000
TIME = 1_234_567_891_123_456_789
UNITS = [100, 1_000, 1_000_000, 10_000_000, SECOND, 2 * SECOND]
ROUNDINGS = {
    "down": lambda time, unit: time // unit * unit,
    "up": lambda time, unit: -(-time // unit) * unit,
    "nearest": lambda time, unit: (time + unit // 2) // unit * unit,
}


def test_a_disk_that_keeps_nanoseconds() -> None:
    """Before anything is learned, and on a disk that keeps every nanosecond, a time is kept as it is."""
    times = KeptTimes()
    assert times.kept(TIME) == TIME
    times.learn(TIME, TIME)
    assert times.kept(TIME + 1) == TIME + 1


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_coarse_disk_is_learned(unit: int, rounding: str) -> None:
    """After a few files the time of every later one is known, whatever the unit is and however the disk rounds."""
    random, times = Random(7), KeptTimes()
    for _ in range(40):
        time = random.randrange(10**18, 2 * 10**18)
        times.learn(time, ROUNDINGS[rounding](time, unit))
    for _ in range(200):
        time = random.randrange(10**18, 2 * 10**18)
        assert times.kept(time) == ROUNDINGS[rounding](time, unit)


def test_one_file_is_enough_for_its_own_time() -> None:
    """The first file whose time comes back coarser is judged right at once."""
    times = KeptTimes()
    times.learn(TIME, TIME // SECOND * SECOND)
    assert times.kept(TIME) == TIME // SECOND * SECOND
    assert times.kept(TIME + SECOND) == TIME // SECOND * SECOND + SECOND


@pytest.mark.parametrize("kept", [0, TIME + 3 * SECOND, TIME - 86_400 * SECOND, TIME + 7])
def test_a_time_that_no_rounding_explains_teaches_nothing(kept: int) -> None:
    """A time out of the disk's range, or set by somebody else meanwhile, does not spoil what is known."""
    times = KeptTimes()
    times.learn(TIME, kept)
    assert times.kept(TIME) == TIME
    times.learn(TIME, TIME // 100 * 100)
    times.learn(TIME, kept)
    assert times.kept(TIME + 200) == (TIME + 200) // 100 * 100


def test_another_file_system_is_learned_anew() -> None:
    """If times come back that contradict the first ones, the last ones count."""
    times = KeptTimes()
    times.learn(TIME, TIME // SECOND * SECOND)
    times.learn(TIME, TIME)
    assert times.kept(TIME) == TIME
    times.learn(TIME, TIME // (2 * SECOND) * (2 * SECOND))
    assert times.kept(TIME) == TIME // (2 * SECOND) * (2 * SECOND)
