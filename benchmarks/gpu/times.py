"""How long the losses take, beside the floor and beside what else one could use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cudfast import CUDLoss, CUDOptions, DUSLoss, DUSOptions
from cudfast.bench.cases import TEMPERATURE, Forward, compiled, eager_cud, through, with_gradient
from cudfast.bench.shapes import Shape
from cudfast.functional import cud_loss, dus_loss

from .place import Place
from .report import Log
from .steps import Item


class Batch(NamedTuple):
    """What one call reads and writes."""

    student: Tensor  # (N, V), a leaf that requires grad
    teacher: Tensor  # (N, V)
    labels: Tensor  # (N,)
    gradient: Tensor  # (N, V)

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: str) -> Batch:
        size = (shape.rows, shape.classes)
        student, teacher = (torch.randn(size, dtype=dtype, device=device).mul_(scale) for scale in (2, 3))
        labels = torch.randint(shape.classes, (shape.rows,), device=device)
        return cls(student.requires_grad_(), teacher, labels, torch.empty_like(teacher))


class Way(NamedTuple):
    """One way to do the work."""

    name: str
    call: Callable[[Batch], Callable[[], object]]
    backend: str = ""
    arrays: int = 3  # (N, V) matrices that have to be read or written
    replay: bool = True  # in a CUDA graph
    call_too: bool = False  # from Python, too


def batches(place: Place, shape: Shape, dtype: torch.dtype) -> list[Batch]:
    """As many as exceed the caches several times, and fit; none where one does not."""
    bytes_ = 3 * shape.rows * shape.classes * dtype.itemsize
    count = max(2, min(16, -(-place.budget // bytes_)))
    while count and not place.fits((count + 1) * bytes_):  # one more: a fresh gradient, random numbers
        count -= 1
    return [Batch.make(shape, dtype, place.device) for _ in range(count)]


def floors() -> list[Way]:
    """The same bytes with one operation per element."""
    return [
        Way("torch.add", lambda b: partial(torch.add, b.student.detach(), b.teacher, out=b.gradient), call_too=True),
        Way("torch.neg", lambda b: partial(torch.neg, b.student.detach(), out=b.gradient), arrays=2),
    ]


def ours(backend: Any) -> list[Way]:
    """The ways to call the library."""
    given, given_dus = CUDOptions(temperature=TEMPERATURE, backend=backend), DUSOptions(backend=backend)
    fresh, state = CUDLoss(TEMPERATURE, backend=backend), CUDLoss(TEMPERATURE, backend=backend, save="state")
    fresh_dus = DUSLoss(backend=backend)

    def way(name: str, forward: Callable[[Batch], Tensor], arrays: int = 3, call_too: bool = False) -> Way:
        def call(b: Batch) -> Callable[[], object]:
            with_loss: Forward = lambda: (forward(b), b.student)  # noqa: E731
            return with_gradient(with_loss)

        return Way(f"{backend}, {name}", call, backend, arrays, call_too=call_too)

    return [
        way("given gradient", lambda b: cud_loss(*b[:3], given, grad_out=b.gradient), call_too=True),
        way("fresh gradient", lambda b: fresh(*b[:3]), call_too=True),
        way('save="state"', lambda b: state(*b[:3])),
        way("DUSLoss, given gradient", lambda b: dus_loss(b.student, b.labels, given_dus, grad_out=b.gradient), 2),
        way("DUSLoss, fresh gradient", lambda b: fresh_dus(b.student, b.labels), 2),
    ]


def liger(b: Batch) -> Callable[[], object]:
    """Liger's KL kernel on log probabilities, as one would write distillation with it."""
    found = importlib.import_module("liger_kernel.ops.kl_div").LigerKLDivLossFunction

    def loss() -> tuple[Tensor, Tensor]:
        target = (b.teacher / TEMPERATURE).log_softmax(-1)
        value = found.apply((b.student / TEMPERATURE).log_softmax(-1), target, "batchmean", True)
        return value * TEMPERATURE**2, b.student

    return with_gradient(loss)


def liger_jsd(b: Batch) -> Callable[[], object]:
    """The same with Liger's JSD kernel."""
    found = importlib.import_module("liger_kernel.ops.jsd").LigerJSDFunction

    def loss() -> tuple[Tensor, Tensor]:
        target = (b.teacher / TEMPERATURE).log_softmax(-1)
        return found.apply((b.student / TEMPERATURE).log_softmax(-1), target, None, 0.5, -100), b.student

    return with_gradient(loss)


def peers() -> list[Way]:
    """What one would use instead, called from Python."""
    fast: list[Any] = []

    def compiled_call(b: Batch) -> Callable[[], object]:
        fast.extend(() if fast else [compiled(eager_cud)])
        return with_gradient(through(fast[0], b.student, b.teacher, b.labels))

    ways = [
        ("eager PyTorch", lambda b: with_gradient(through(eager_cud, b.student, b.teacher, b.labels))),
        ("torch.compile", compiled_call),
        ("Liger KL (no clip, no CE)", liger),
        ("Liger JSD (no clip, no CE)", liger_jsd),
    ]
    return [Way(name, call, replay=False) for name, call in ways]


def timed(place: Place, shape: Shape, dtype: torch.dtype, sets: Sequence[Batch], way: Way, log: Log) -> float:
    """Times one way, writes it, and returns its milliseconds."""
    calls = [way.call(batch) for batch in sets]
    name = "torch.neg" if way.arrays == 2 else "torch.add"
    peak = None if way.name == name else place.clock.peak(calls[0])
    called = place.clock.called(calls) if way.call_too or not way.replay else None
    replayed = place.clock.replayed(calls) if way.replay else called
    assert replayed is not None
    floor = None if way.name == name else next(
        (r["milliseconds"] for r in reversed(log.of("time")) if r["name"] == name
         and (r["shape"], r["dtype"]) == (str(shape), str(dtype)[6:])), None,
    )  # fmt: skip
    moved = way.arrays * shape.rows * shape.classes * dtype.itemsize
    log.write(
        "time", shape=str(shape), dtype=str(dtype)[6:], name=way.name, backend=way.backend, milliseconds=replayed,
        gigabytes_per_second=moved / replayed / 1e6, floor=name, of_floor=floor / replayed if floor else None,
        called_ms=called, peak_bytes=peak,
    )  # fmt: skip
    return replayed


def race(place: Place, shape: Shape, dtype: torch.dtype, ways: Sequence[Way], log: Log) -> str | None:
    """All ways at one shape. One that fails is named, and the others go on."""
    sets = batches(place, shape, dtype)
    if not sets:
        return "left out: too little memory"
    failed, wrong = [], False
    for way in ways:
        try:
            timed(place, shape, dtype, sets, way, log)
        except Exception as error:  # a peer that is not installed, too little memory, a graph that cannot be captured
            wrong = wrong or bool(way.backend)
            failed.append(f"{way.name}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            if place.device == "cuda":
                torch.cuda.synchronize()
    del sets
    if place.device == "cuda":
        torch.cuda.empty_cache()
    if wrong:
        raise RuntimeError("; ".join(failed))
    return f"left out: {'; '.join(failed)}" if failed else None


def floor_items(place: Place) -> Iterator[Item]:
    """What a copy and an addition reach, at several sizes."""
    for gigabytes in (1, 2, 4, 8):
        elements = (gigabytes << 30) // 6 if not place.stand_in else 256
        shape = Shape(max(1, elements // 32_768), min(elements, 32_768))
        copy = Way("copy", lambda b: partial(b.gradient.copy_, b.teacher), arrays=2)
        ways = [*floors(), copy]
        yield Item(f"torch.add over {gigabytes} GB", partial(race, place, shape, place.dtype, ways))


def items(place: Place) -> Iterator[Item]:
    """Every shape, with the ways of all backends."""
    for shape in place.races:
        ways = [*floors(), *(way for backend in place.backends() for way in ours(backend))]
        yield Item(f"{shape} {str(place.dtype)[6:]}", partial(race, place, shape, place.dtype, ways))


def more_items(place: Place) -> Iterator[Item]:
    """float32, for a run without a limit."""
    for shape in place.races:
        ways = [*floors(), *(way for backend in place.backends() for way in ours(backend))]
        yield Item(f"{shape} float32", partial(race, place, shape, torch.float32, ways))


def peer_items(place: Place) -> Iterator[Item]:
    """Each peer by itself: compiling one takes longer than timing it."""
    for shape in place.peers:
        for way in peers()[: 1 if place.stand_in else None]:  # the others compile
            run = partial(race, place, shape, place.dtype, [way])
            yield Item(f"{shape} {way.name}", run, patience=180.0)
