"""Which plan is the fastest at each V: a table from which the plans of both backends choose."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cudfast.backends import tuning
from cudfast.bench.cases import eager_cud, eager_dus, through, with_gradient
from cudfast.bench.gate import Errors, Loss, gate, truth
from cudfast.bench.shapes import Shape
from cudfast.options import BackendName

from . import times
from .place import Place
from .report import Log
from .steps import Item

GAIN = 0.98  # of the default's time: a plan that saves less is not kept
TABLE = "tuning.json"
LOSSES = {"student": "given gradient", "teacher": "DUSLoss, given gradient"}


def plans(backend: BackendName, small: bool = False) -> list[str]:
    """What is tried, the default first."""
    blocks, threads = ((2048,), (64,)) if small else ((2048, 4096, 8192), (256, 512, 128))
    if backend == "triton":
        choices = itertools.product(blocks, (4, 8) if small else (8, 4, 16, 32), (1,) if small else (1, 3))
        return [tuning.DEFAULT, *(f"block={block},warps={warps},stages={stages}" for block, warps, stages in choices)]
    clusters = (1, 2) if small else (1, 2, 4, 8, 16)
    return [
        tuning.DEFAULT,
        *(f"cluster={cluster},threads={most}" for cluster, most in itertools.product(clusters, threads)),
    ]


@contextmanager
def planned(backend: BackendName, plan: str) -> Iterator[None]:
    """Launches of the backend follow this plan."""
    name = tuning.variable(backend)
    kept = os.environ.get(name)
    os.environ[name] = plan
    try:
        yield
    finally:
        del os.environ[name]
        if kept is not None:
            os.environ[name] = kept


def way_of(backend: BackendName, loss: str) -> times.Way:
    (found,) = (way for way in times.ours(backend) if way.name == f"{backend}, {LOSSES[loss]}")
    return found


def few_rows(place: Place, shape: Shape) -> Shape:
    """As few as keep a row whole: the same kernels in less time."""
    processors = place.chip.processors if place.chip else 132
    return Shape(min(shape.rows, 2 * processors + 1), shape.classes)


def right(place: Place, shape: Shape, backend: BackendName, loss: str) -> None:
    """The numbers of the plan in force, against float64."""
    batch = times.Batch.make(few_rows(place, shape), place.dtype, place.device)
    plain: Loss = eager_cud if loss == "student" else eager_dus
    rest = (batch.teacher, batch.labels) if loss == "student" else (batch.labels,)
    true = truth(plain, batch.student.detach(), *rest)
    eager = Errors.of(with_gradient(through(plain, batch.student, *rest))(), true)
    got: Any = way_of(backend, loss).call(batch)()
    gate(loss, got, true, eager, 2.0)


def compile_all(place: Place, shape: Shape, backend: BackendName, loss: str, plan: str) -> str | None:
    """Compiles what `sweep` will launch."""
    with planned(backend, plan):
        way_of(backend, loss).call(times.Batch.make(few_rows(place, shape), place.dtype, place.device))()
    return None


def sweep(place: Place, shape: Shape, backend: BackendName, loss: str, folder: Path, log: Log) -> str | None:
    """Times every plan that gives the right numbers; keeps the fastest, if it gains something."""
    sets = times.batches(place, shape, place.dtype)
    if not sets:
        return "left out: too little memory"
    way, found = way_of(backend, loss), {}
    for plan in plans(backend, place.stand_in):
        milliseconds, verdict = 0.0, "ok"
        with planned(backend, plan):
            try:
                right(place, shape, backend, loss)
                milliseconds = found[plan] = place.clock.replayed([way.call(batch) for batch in sets])
            except Exception as error:  # a plan that cannot be launched, or is wrong
                verdict = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        log.write("sweep", backend=backend, loss=loss, shape=str(shape), plan=plan,
                  milliseconds=milliseconds, verdict=verdict)  # fmt: skip
    if tuning.DEFAULT not in found:
        raise AssertionError("the default plan failed")
    best = min(found, key=lambda plan: found[plan])
    if found[best] <= GAIN * found[tuning.DEFAULT] and not place.stand_in:
        keep(folder, entry(place, shape, backend, loss, best))
    return None


def entry(place: Place, shape: Shape, backend: BackendName, loss: str, plan: str) -> dict[str, Any]:
    """Of the table: see `cudfast.backends.tuning`."""
    return {
        "backend": backend, "target": tuning.target(torch.device(place.device, 0)), "loss": loss,
        "bytes": place.dtype.itemsize, "classes": tuning.power(shape.classes), "plan": tuning.parsed(backend, plan),
        "source": f"{place.facts['device']}, {shape}, {datetime.date.today()}",
    }  # fmt: skip


def keep(folder: Path, found: dict[str, Any]) -> None:
    """Into the run's table, which begins as the package's."""
    path = folder / TABLE
    known = json.loads((path if path.exists() else tuning.TABLE).read_text())
    known = [each for each in known if tuning.key(each) != tuning.key(found)] + [found]
    draft = path.with_suffix(".tmp")
    draft.write_text("[\n" + ",\n".join(json.dumps(each) for each in known) + "\n]\n")
    os.replace(draft, path)


def items(place: Place, folder: Path) -> Iterator[Item]:
    """The student loss first."""
    for loss, shape, backend in itertools.product(LOSSES, place.swept, place.backends()):
        run = partial(sweep, place, shape, backend, loss, folder)
        yield Item(f"{backend}, {loss}, {shape}", run, backend)


def jobs(place: Place) -> list[Callable[[], object]]:
    """Everything that Triton compiles for the sweep."""
    return [
        partial(compile_all, place, shape, "triton", loss, plan)
        for loss, shape in itertools.product(LOSSES, place.swept)
        for plan in plans("triton", place.stand_in)
    ]
