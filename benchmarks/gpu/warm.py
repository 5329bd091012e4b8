"""Compiles Triton's kernels in processes of their own, while other work goes on: `python -m benchmarks.gpu.warm I OF`.

They make the calls that will be made later, and ignore the results; Triton's cache on disk is what they leave.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import checks, sweep
from .place import Place, gpu, stand_in
from .report import Log
from .supervise import die_with_parent


def jobs(place: Place) -> list[Callable[[], object]]:
    """What is checked and swept with Triton, in this order."""
    if "triton" not in place.backends():
        return []
    return [*(check for _, check in checks.table(place, "triton")), *sweep.jobs(place)]


def run(found: list[Callable[[], object]]) -> int:
    """Returns how many failed: they will fail again where it counts."""
    failed = 0
    for job in found:
        try:
            job()
        except Exception:  # the checks report it
            failed += 1
    return failed


class Workers:
    """The processes."""

    def __init__(self, count: int | None = None) -> None:
        self.count = max(1, min(16, os.cpu_count() or 1)) if count is None else count
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, log: Log) -> str | None:
        """Begins."""
        command = [sys.executable, "-m", "benchmarks.gpu.warm"]
        for index in range(self.count):
            self._processes.append(
                subprocess.Popen([*command, str(index), str(self.count)], cwd=Path(__file__).parents[2])
            )
        return None if self.count else "left out: the interpreter compiles nothing"

    def wait(self, seconds: float) -> str | None:
        """Until all are done; those that are not by then are ended."""
        left_over = 0
        end = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                left_over += 1
        self._processes.clear()
        return (
            f"left out: {left_over} of {self.count} processes were not ready after {seconds:g} s" if left_over else None
        )


def main(arguments: list[str]) -> int:
    die_with_parent()
    import torch

    index, count = map(int, arguments)
    run(jobs(gpu() if torch.cuda.is_available() else stand_in())[index::count])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
