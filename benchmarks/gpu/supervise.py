"""Runs the work in a process that may be lost: a kernel that hangs or writes where it must not takes its process along.

Another one then goes on after the item that did it, which has failed.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

AGAIN = 3  # exit status of a worker whose GPU no longer answers it
MOST = 20  # processes, after which something else is wrong
STARTING = 120.0  # seconds that a process may take until it begins something


def die_with_parent() -> None:
    """Linux ends this process when the one that started it has ended."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def last_line(path: Path) -> dict[str, Any]:
    """The last record that is whole, or an empty one."""
    for line in reversed(path.read_bytes().splitlines()) if path.exists() else ():
        try:
            found: dict[str, Any] = json.loads(line)
            return found
        except ValueError:
            continue
    return {}


class Watch:
    """Whether a worker hangs: it has written nothing for longer than what it last began may take."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self.restart()

    def restart(self) -> None:
        """A new process."""
        self._size, self._since, self._fresh = self._measure(), self._clock(), True

    def _measure(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def hangs(self) -> bool:
        """Now."""
        if (size := self._measure()) != self._size:
            self._size, self._since, self._fresh = size, self._clock(), False
        patience = STARTING if self._fresh else float(last_line(self._path).get("patience", STARTING))
        return self._clock() - self._since > patience


def _written(path: Path) -> int:
    """When a file was written last."""
    return path.stat().st_mtime_ns if path.exists() else 0


def supervise(
    command: Sequence[str],
    lines: Path,
    *,
    start: Callable[[Sequence[str]], Any] = subprocess.Popen,
    watch: Watch | None = None,
    pause: float = 0.5,
) -> int:
    """Starts workers until one is done; returns its exit status.

    Args:
        command: of a worker; the second and later ones get --resume.
        lines: the file that workers write.
        start: starts a process.
        watch: says when a process hangs.
        pause: seconds between two looks.
    """
    status, stale = AGAIN, _written(lines)
    for attempt in range(MOST):
        watch = watch or Watch(lines)
        watch.restart()
        process = start([*command, *(["--resume"] if attempt else [])])
        while True:
            try:
                status = process.wait(pause)
                break
            except subprocess.TimeoutExpired:
                if watch.hangs():
                    process.kill()
                    status = process.wait()
                    break
        begun = _written(lines) != stale and last_line(lines).get("kind") != "end"
        if status != AGAIN and not (status < 0 and begun):
            break
    return int(status)
