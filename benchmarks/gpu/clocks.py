"""How long calls take: by events around replays of a CUDA graph, or on the host. Tests replace them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Calls = Sequence[Callable[[], object]]
"""The same work on several sets of buffers, together larger than the caches."""


class Clock(Protocol):
    """Milliseconds of one call."""

    def replayed(self, calls: Calls) -> float:
        """Without the host: all calls in one graph."""

    def called(self, calls: Calls) -> float:
        """With the host's work, one call after the other."""

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes that a call allocates at most."""


class GraphClock:
    """CUDA's. A graph is warmed up on a stream of its own, as capturing demands."""

    def __init__(self, seconds: float = 0.2, fewest: int = 5, most: int = 200) -> None:
        self._seconds, self._fewest, self._most = seconds, fewest, most

    def _median(self, run: Callable[[], object], calls: int) -> float:
        """Of the times of `run`, by `calls`."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * self._most)]
        run()
        torch.cuda.synchronize()

        def timed(begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
            begin.record()
            run()
            end.record()

        timed(*events[:2])
        torch.cuda.synchronize()
        first = events[0].elapsed_time(events[1])
        rounds = max(self._fewest, min(self._most, int(1e3 * self._seconds / max(first, 1e-3))))
        for i in range(rounds):
            timed(*events[2 * i : 2 * i + 2])
        torch.cuda.synchronize()
        times = [events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(rounds)]
        return float(statistics.median(times)) / calls

    def replayed(self, calls: Calls) -> float:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (calls[0], *calls):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        try:
            return self._median(graph.replay, len(calls))
        finally:
            graph.reset()

    def called(self, calls: Calls) -> float:
        def all_calls() -> None:
            for call in calls:
                call()

        return self._median(all_calls, len(calls))

    def peak(self, call: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class HostClock:
    """The stand-in's: one call of each."""

    def called(self, calls: Calls) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e3 * (time.perf_counter() - start) / len(calls)

    replayed = called

    def peak(self, call: Callable[[], object]) -> int:
        return 0
