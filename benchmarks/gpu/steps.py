"""What is done, in order of importance, and what is dropped where time is short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .place import Place
from .report import FAILED, Log


class Item(NamedTuple):
    """One thing to do."""

    what: str
    run: Callable[[Log], str | None]  # writes what it finds; returns "left out: why" or None; raises if it is wrong
    backend: str = ""
    proves: bool = False  # that the backend's results are right
    patience: float = 90.0  # seconds without a line, after which the GPU counts as hung


class Step(NamedTuple):
    """Items that belong together, the most important first."""

    name: str
    seconds: float  # that it takes on an H200
    items: Callable[[Place], Iterator[Item]]


def budgets(steps: Sequence[Step], minutes: float | None) -> dict[str, float | None]:
    """When each step has to be over, in seconds after the start. The last steps are dropped until the others fit; what
    is left is theirs in proportion. Without a limit there is no end.

    Example:
        >>> steps = [Step("a", 30, lambda place: iter(())), Step("b", 60, lambda place: iter(()))]
        >>> budgets(steps, 1), budgets(steps, 3)
        ({'a': 60.0}, {'a': 60.0, 'b': 180.0})
    """
    if minutes is None:
        return dict.fromkeys((step.name for step in steps), None)
    kept = list(steps)
    while len(kept) > 1 and sum(step.seconds for step in kept) > 60 * minutes:
        kept.pop()
    stretch = 60 * minutes / sum(step.seconds for step in kept)
    ends: dict[str, float | None] = {}
    end = 0.0
    for step in kept:
        end += step.seconds * stretch
        ends[step.name] = end
    return ends


def run_item(step: str, item: Item, log: Log) -> None:
    """Whatever it raises is its verdict, and the run goes on."""
    about = {"step": step, "what": item.what, "backend": item.backend, "proves": item.proves}
    log.write("begin", **about, patience=item.patience)
    start = time.perf_counter()
    try:
        verdict = item.run(log) or "ok"
    except Exception as error:  # every failure belongs in the report
        verdict = f"{FAILED}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    log.write("done", **about, verdict=verdict, seconds=time.perf_counter() - start)


def items_of(step: Step, place: Place) -> Iterator[Item]:
    """Of a step; where they cannot be listed, that is an item which fails."""
    try:
        yield from step.items(place)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"

        def fail(log: Log) -> None:
            raise RuntimeError(message)

        yield Item("the rest cannot be listed", fail)


class LostError(RuntimeError):
    """No more work can be done in this process."""


def run(
    steps: Sequence[Step],
    place: Place,
    log: Log,
    *,
    minutes: float | None = None,
    only: str = "",
    begun: float | None = None,
    clock: Callable[[], float] = time.time,
    lost: Callable[[], bool] = lambda: False,
) -> None:
    """Every step; what the log already has is not done again.

    Args:
        steps: in order of importance.
        place: where.
        log: takes the results; holds those of a process that this one replaces.
        minutes: for the whole run, from the first process on.
        only: a text that the names of steps or items must contain.
        begun: when the run began, by `clock`; now, if it is not given.
        clock: seconds, the same for all processes of a run.
        lost: whether the GPU no longer answers this process.

    Raises:
        LostError: it does not; a new process may go on.
    """
    if not log.of("plan"):
        ends = budgets(steps, minutes)
        log.write("plan", begun=clock() if begun is None else begun, minutes=minutes, ends=ends)
        for step in steps:
            if step.name not in ends:
                log.write("dropped", step=step.name, what="all", why=f"{minutes:g} minutes are too few")
    plan = log.of("plan")[0]
    settled = {(r["step"], r["what"]) for r in log.records if r["kind"] in ("done", "dropped")}
    for r in log.of("begin"):
        if (r["step"], r["what"]) not in settled:
            about = {key: r[key] for key in ("step", "what", "backend", "proves")}
            log.write("done", **about, verdict=f"{FAILED}: the process ended or hung here", seconds=0.0)
            settled.add((r["step"], r["what"]))
    for step in steps:
        if step.name not in plan["ends"]:
            continue
        for item in items_of(step, place):
            if only not in f"{step.name}: {item.what}" or (step.name, item.what) in settled:
                continue
            end = plan["ends"][step.name]
            if end is not None and clock() - plan["begun"] >= end:
                log.write("dropped", step=step.name, what=item.what, why="the time of this step is over")
                continue
            run_item(step.name, item, log)
            if log.records[-1]["verdict"].startswith(FAILED) and lost():
                raise LostError(f"{step.name}: {item.what}")
    log.write("end")
