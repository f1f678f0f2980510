"""Modification times in ns since the epoch, as far as the record's column can hold them."""

_LEAST, _MOST = -(2**63), 2**63 - 1


def clamp_ns(modified_ns: int) -> int:
    """Return the time, or the nearest one that a signed 64-bit integer of ns can hold (years 1677 to 2262)."""
    return max(_LEAST, min(_MOST, modified_ns))
