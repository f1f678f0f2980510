"""How exactly a disk keeps times: NTFS 100 ns, exFAT 10 ms, others 1 s, FAT 2 s. Learned from times that come back."""

from collections.abc import Callable

from ..content.times import clamp_ns

_UNITS = (100, 1_000, 1_000_000, 10_000_000, 1_000_000_000, 2_000_000_000)  # ns
_REMEMBERED = 16  # observations that a rule must explain

Rule = Callable[[int, int], int]


def _down(time: int, unit: int) -> int:
    return time // unit * unit


def _up(time: int, unit: int) -> int:
    return -(-time // unit) * unit


def _nearest(time: int, unit: int) -> int:
    return (time + unit // 2) // unit * unit


class KeptTimes:
    """Tells the time that a disk gives back for one that was set; before anything is learned, the same time."""

    def __init__(self) -> None:
        self._rule: tuple[Rule, int] = (_down, 1)
        self._observed: list[tuple[int, int]] = []

    def kept(self, modified_ns: int) -> int:
        """Return the time, in ns since the epoch, that this disk gives back for `modified_ns`."""
        round_, unit = self._rule
        return round_(clamp_ns(modified_ns), unit)

    def learn(self, wanted: int, kept: int) -> None:
        """Take note of a time that was set and read back. A time that no rounding explains teaches nothing."""
        if self.kept(wanted) == kept:
            return
        latest = (wanted, kept)
        for observed in ([*self._observed[1 - _REMEMBERED :], latest], [latest]):  # another file system below the root
            rule = _rule_of(observed)
            if rule is not None:
                self._rule, self._observed = rule, observed
                return


def _rule_of(observed: list[tuple[int, int]]) -> tuple[Rule, int] | None:
    rules = [(_down, 1), *((round_, unit) for unit in _UNITS for round_ in (_down, _up, _nearest))]
    return next((rule for rule in rules if all(rule[0](wanted, rule[1]) == kept for wanted, kept in observed)), None)
