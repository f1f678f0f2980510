"""Random paths, headers and records: Hypothesis generates bytes quickly, atheris is guided by coverage."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from selfheal import UploadStore, bulk
from selfheal.bulk.outcomes import Outcome
from tests.support import environment
from tests.support.fuzz_targets import TARGETS, Headers, Paths, Records, Target
from tests.support.raw_sql import execute
from tests.support.requirements import needs

TIMES = {Paths: (2_000, 100_000), Headers: (4_000, 200_000), Records: (300, 20_000)}
FUZZ = """
import sys, atheris
with atheris.instrument_imports(include=["selfheal"]):
    from tests.support import fuzz_targets
fuzz_targets.fuzz(sys.argv)
"""


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every target."""
    with closing(TARGETS[request.param]()) as target:
        yield target


@pytest.mark.timeout(7200)  # Hypothesis shrinks a failure before it reports it
def test_random_bytes(target: Target, times: Callable[[int, int], int], caplog: pytest.LogCaptureFixture) -> None:
    """Every answer to a random request obeys the contract, and only the files of right records are written."""
    caplog.set_level(logging.CRITICAL, "selfheal")
    many = times(*TIMES[type(target)])

    @given(st.binary(max_size=40) | st.binary(min_size=40, max_size=200))
    @settings(max_examples=many, suppress_health_check=list(HealthCheck))
    def check(data: bytes) -> None:
        target.check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_guided_by_coverage(
    name: str,
    tmp_path: Path,
    times: Callable[[int, int], int],
    record_property: Callable[[str, object], None],
) -> None:
    """The same holds for bytes that a fuzzer derives from those that reached new lines of selfheal."""
    seconds = times(0, 900)
    if not seconds:
        pytest.skip("only in a campaign: pytest --campaign")
    if importlib.util.find_spec("atheris") is None:
        needs("atheris", "pip install atheris (Linux on x86-64)")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FUZZ,
            name,
            f"-max_total_time={seconds}",
            "-max_len=400",
            "-len_control=0",
            "-print_final_stats=1",
        ],
        env=environment(TMPDIR=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    record_property("executions", re.findall(r"number_of_executed_units: (\d+)", done.stderr)[-1])
    record_property("edges", re.findall(r"cov: (\d+)", done.stderr)[-1])


# -- records that other programs wrote ---------------------------------------------------------------------------------


async def outcomes(store: UploadStore) -> list[dict[str, Outcome]]:
    """Return the outcomes of `verify` and of `restore` by name."""
    return [{one.name: one.outcome async for one in run(store)} for run in (bulk.verify, bulk.restore)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("created_at = 'yesterday', changed_at = 5", {"a.jpg": Outcome.RESTORED}),
        ("deleted_at = 'yesterday'", {}),
        ("name = CAST(x'61ff' AS TEXT)", {"a\udcff": Outcome.INVALID_NAME}),
        ("sha256 = CAST(x'61ff' AS TEXT)", {"a.jpg": Outcome.CORRUPT_IN_DATABASE}),
        ("content_type = CAST(x'61ff' AS TEXT)", {"a.jpg": Outcome.RESTORED}),
        ("name = ''", {"": Outcome.INVALID_NAME}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_impossible_record(sqlite_store: UploadStore, change: str, expected: dict[str, Outcome]) -> None:
    """A row that cannot be a record is reported by name, all others are restored."""
    for name in ("a.jpg", "b.jpg"):
        await sqlite_store.database.store_image(name, name.encode())
    await execute(sqlite_store, f"UPDATE image_storage SET {change} WHERE name = 'a.jpg'")
    verified, restored = await outcomes(sqlite_store)
    assert restored == expected | {"b.jpg": Outcome.RESTORED}
    missing = {name for name, outcome in verified.items() if outcome == Outcome.MISSING_ON_DISK}
    assert missing == {name for name, outcome in restored.items() if outcome == Outcome.RESTORED}
    assert verified.keys() == restored.keys()


@pytest.mark.parametrize(
    ("table", "change"),
    [
        *(
            ("image_storage", f"{column} = {value}")
            for column in ("size", "modified_ns")
            for value in ("'many'", "9.5")
        ),
        *(("image_storage", f"{column} = x'61ff'") for column in ("name", "sha256", "content_type", "deleted_at")),
        *(("image_chunk", f"data = {value}") for value in ("'some text'", "5", "1.5")),
        *(("image_chunk", change) for change in ("digest = 'some text'", "digest = 5", "position = 'first'")),
    ],
)
async def test_sqlite_refuses_a_value_of_another_type(sqlite_store: UploadStore, table: str, change: str) -> None:
    """The tables of a new file are STRICT: a value of another type is refused, whichever program writes it."""
    await sqlite_store.database.store_image("a.jpg", b"a picture")
    with pytest.raises(IntegrityError, match="cannot store"):
        await execute(sqlite_store, f"UPDATE {table} SET {change}")
    assert (await outcomes(sqlite_store))[0] == {"a.jpg": Outcome.MISSING_ON_DISK}
