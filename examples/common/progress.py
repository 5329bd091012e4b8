"""One bar over the whole run on a terminal; one line per phase elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_RATE_WINDOW_S = 60.0


class Meter:
    """Counts units of work towards ``total`` and shows the current phase; use as a context manager."""

    def __init__(self, console: Console, total: float) -> None:
        self._console = console
        self._begin = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_RATE_WINDOW_S,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, text: str) -> None:
        """Name the work that begins now."""
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(f"{time.monotonic() - self._begin:6.1f} s  {text}")

    def tick(self, units: float = 1.0) -> None:
        """Count ``units`` of work as done."""
        self._bar.advance(self._task, units)
