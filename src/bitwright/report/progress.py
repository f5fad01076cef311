"""Progress of a long operation: a bar with the time left on a terminal, plain lines elsewhere."""

import math
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from bitwright.core.progress import Progress
from bitwright.report.tables import duration, size

BAR_WIDTH = 20
SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES = 10.0, 0.1
MANY, BRIEFLY = 100, 2.0
"""A stage of fewer steps has no line for a tenth that took fewer seconds: each step would be a line."""


class ProgressReport:
    """A listener that shows Progress on a console; as a context manager, it removes the bar at the end."""

    def __init__(self, console: Console) -> None:
        """Show a live bar on a terminal; otherwise a line for every tenth of a stage, or every ten seconds.

        Of a short stage, only the end is a line.
        """
        self._console = console
        self._bars = _bars(console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._position: dict[str, float] = {}
        self._begun_at: dict[str, float] = {}
        self._last_position: dict[str, float] = {}
        self._last_line = 0.0

    def __enter__(self) -> "ProgressReport":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one step."""
        if progress.resumed:
            unit = progress.unit
            message = f"going on: {progress.done} of {progress.total} {unit} were finished before"
            self._console.print(message, highlight=False)
            return
        if progress.position < self._position.get(progress.stage, math.inf):  # a stage begins, perhaps again
            self._started[progress.stage] = self._last_line = monotonic()
            self._begun_at[progress.stage] = self._last_position[progress.stage] = progress.position
        self._position[progress.stage] = progress.position
        if self._bars is None:
            self._line(progress)
        else:
            self._bar(progress, self._bars)

    def _bar(self, progress: Progress, bars: Bars) -> None:
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = bars.add_task(progress.stage, total=progress.total)
        memory = f"peak {size(progress.peak_bytes)}" if progress.peak_bytes else ""
        unit = progress.unit if progress.unit not in _COUNTED else ""
        bars.update(
            self._tasks[progress.stage],
            completed=progress.position,
            total=progress.total,
            description=" ".join(filter(None, (progress.stage, unit, progress.detail, memory))),
        )

    def _line(self, progress: Progress) -> None:
        now, advanced = monotonic(), progress.position - self._last_position[progress.stage]
        tenth = not progress.part and advanced >= SHARE_BETWEEN_LINES * progress.total
        tenth = tenth and (progress.total >= MANY or now - self._last_line > BRIEFLY)
        due = progress.done == progress.total or tenth or now - self._last_line > SECONDS_BETWEEN_LINES
        advance = progress.position - self._begun_at[progress.stage]
        if not due or progress.position == 0 or (advance == 0 and progress.done < progress.total):
            return
        self._last_line, self._last_position[progress.stage] = now, progress.position
        spent = now - self._started[progress.stage]
        left = spent / advance * (progress.total - progress.position) if advance else 0.0
        memory = f", peak memory {size(progress.peak_bytes)}" if progress.peak_bytes else ""
        share = f"{progress.done}/{progress.total}" if progress.unit != "bytes" else _percent(progress)
        named = (progress.unit if progress.unit not in _COUNTED else "", progress.detail)
        detail = f", {' '.join(filter(None, named))}" if progress.detail else ""
        times = f"{duration(spent)} so far, about {duration(left)} left"
        self._console.print(f"{progress.stage} {share}{detail}, {times}{memory}", highlight=False)


_COUNTED = ("bytes", "windows", "answers", "programs")


def _percent(progress: Progress) -> str:
    return f"{100 * progress.done / max(1, progress.total):.0f}% of {size(progress.total)}"


def _bars(console: Console) -> Bars:
    # The description is what gives way on a narrow terminal, not the time that is left.
    words = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (words, BarColumn(bar_width=BAR_WIDTH), TaskProgressColumn(), TimeRemainingColumn())
    return Bars(*columns, console=console, transient=True, expand=True)
