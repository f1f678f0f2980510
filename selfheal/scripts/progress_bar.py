"""The progress bar of a run, on a terminal's standard error. It needs the extra `cli`."""

import time

from rich import progress as bars
from rich.console import Console, RenderableType

from ..bulk.outcomes import Result
from ..content.byte_counter import BYTES_READ
from ..sql.models import Total
from .summary import human_size

_READS = {"migrate": 2, "verify": 2, "restore": 1, "import": 2, "export": 1}
"""How often a run reads the bytes of a large file at most: on disk and in the database."""


class ProgressBar(bars.Progress):
    """Draws files, bytes, rate and the time left; moves within a large file too. `total` is None if nobody knows it."""

    def __init__(self, command: str, total: Total | None) -> None:
        self._reads = _READS[command]
        self._of_all = "" if total is None else f" of {total.count:,}"
        self._files = self._size = self._shown = 0
        self._started = time.monotonic()
        text = bars.TextColumn("{task.fields[text]}")
        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), text, bars.TimeRemainingColumn())
        super().__init__(*columns, console=Console(stderr=True), transient=True)
        size = total.size if total is not None and 0 < total.size < 2**63 else None
        self.add_task(command, total=size, text="")

    def add(self, result: Result) -> None:
        """Count the files of a result."""
        self._files += result.count
        self._size += result.size

    def get_renderables(self) -> list[RenderableType]:
        """Draw what is done now; called several times a second."""
        self._shown = max(self._shown, self._size + BYTES_READ.total // self._reads)
        seconds = max(time.monotonic() - self._started, 0.001)
        rate = human_size(int(self._shown / seconds))
        text = f"{self._files:,}{self._of_all} files · {human_size(self._shown)} · {rate}/s"
        for task in self.tasks:
            self.update(task.id, completed=self._shown, text=text)
        return list(super().get_renderables())
