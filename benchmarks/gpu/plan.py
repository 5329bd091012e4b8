"""The steps of a run, the most important first, with the seconds that they take on an H200."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from . import checks, sweep, times, tools
from .place import Place
from .steps import Item, Step
from .warm import Workers

COMPILING = 20.0  # seconds that are waited for the processes that compile, after all checks


def floor(place: Place) -> Iterator[Item]:
    """What is here, and what a simple operation reaches."""
    yield Item("cudfast info", partial(tools.facts, place))
    yield from times.floor_items(place)


def cuda(place: Place, workers: Workers) -> Iterator[Item]:
    """While other processes compile for Triton."""
    yield Item("Triton's compilers begin", workers.start)
    yield from checks.items(place, "cuda")


def triton(place: Place) -> Iterator[Item]:
    """What the processes have not compiled yet is compiled here."""
    return checks.items(place, "triton")


def timed(place: Place, workers: Workers) -> Iterator[Item]:
    """Nothing else runs beside it."""
    yield Item("Triton's compilers are done", lambda log: workers.wait(COMPILING), patience=COMPILING + 30)
    yield from times.items(place)


def rest(place: Place) -> Iterator[Item]:
    """What only a run without a limit has time for."""
    return chain(*(checks.every_dtype(place, backend) for backend in place.backends()), times.more_items(place))


def steps(here: Place, folder: Path, workers: Workers | None = None) -> list[Step]:
    """Of a run at a place, whose tuning table goes into a folder."""
    found = workers or Workers(0 if here.stand_in else None)
    todo: list[tuple[str, float, Callable[[Place], Iterator[Item]]]] = [
        ("floor", 10, floor),
        ("cuda", 60, lambda place: cuda(place, found)),
        ("triton", 40, triton),
        ("times", 120, lambda place: timed(place, found)),
        ("sweep", 80, lambda place: sweep.items(place, folder)),
        ("peers", 50, times.peer_items),
        ("ncu", 40, tools.profile_items),
        ("sanitizers", 80, tools.sanitizer_items),
        ("more", 3600, rest),
    ]
    return [Step(*each) for each in todo]
