"""Pictures of every kind, damaged at random, through the upload policy."""

from __future__ import annotations

import random
from collections.abc import Callable

from selfheal import UploadPolicy, UploadRefused
from tests.support.checked_uploads import STRICT, WITH_SVG, checked
from tests.support.sample_images import IMAGES, each, sample

ANY = UploadPolicy(extensions=None)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the data cut off, with flipped bits, without a part, with a part twice, or with zeros or ones."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 40))):
        at = rng.randrange(max(min(len(changed), rng.choice((60, 800, 10**9))), 1))
        part = rng.choice((1, 2, 4, 100))
        match rng.randrange(5):
            case 0:
                del changed[at + 1 :]
            case 1:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if changed else b""
            case 2:
                del changed[at : at + part]
            case 3:
                changed[at:at] = changed[at : at + part]
            case _:
                changed[at : at + part] = rng.choice((b"\0", b"\xff")) * part
    return bytes(changed)


@each(IMAGES)
async def test_damaged_pictures(
    name: str, times: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    """A damaged picture of any kind passes unchanged or is refused (415, 422); strictly, no more of them pass."""
    end, data = sample(name)
    rng = random.Random(name)
    count = times(60, 20_000)
    record_property(f"{name} damaged", count)
    for _ in range(count):
        given = damaged(data, rng)
        statuses = {}
        for policy in (STRICT, WITH_SVG, ANY):
            try:
                assert await checked(policy, end, given) == given
                statuses[policy] = 200
            except UploadRefused as error:
                statuses[policy] = error.status
        assert set(statuses.values()) <= {200, 415, 422}
        assert statuses[STRICT] != 200 or statuses[WITH_SVG] == 200
