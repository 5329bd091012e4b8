"""Calls that compute-sanitizer and ncu watch: `python -m benchmarks.gpu.kernels`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from cudfast import CUDLoss, DUSLoss, Projection
from cudfast.bench.cases import TEMPERATURE
from cudfast.bench.shapes import Shape
from cudfast.options import BackendName

from .checks import SAVES
from .place import Place, gpu, stand_in

ROWS = 8  # that count: the others keep the layout, and cost nothing


def labels_of(shape: Shape, device: str) -> Tensor:
    """(N,): -100 in all rows but ROWS, from the first to the last."""
    labels = torch.full((shape.rows,), -100, device=device)
    counted = torch.linspace(0, shape.rows - 1, min(ROWS, shape.rows), device=device).long()
    labels[counted] = torch.randint(shape.classes, (len(counted),), device=device)
    return labels


def every_kernel(backend: BackendName, dtype: torch.dtype, device: str, shapes: Iterable[Shape]) -> None:
    """Every kernel of a backend on these rows."""
    bounds = Projection(min_near_mass=0.3, max_wrong_mass=0.1, min_entropy=3.0, on_infeasible="relax")
    for shape in shapes:
        x = torch.randn(shape.rows, shape.classes, device=device, dtype=dtype, requires_grad=True)
        t, y = torch.randn_like(x), labels_of(shape, device)
        losses: list[tuple[CUDLoss | DUSLoss, tuple[Tensor, ...]]] = []
        for save in SAVES:
            usual = CUDLoss(save=save, backend=backend)
            losses += [(usual, (t, y)), (usual, (t.to(torch.float16), y))]  # one dtype, and two
            losses += [(CUDLoss(3.0, save=save, backend=backend), (t, y)), (DUSLoss(save=save, backend=backend), (y,))]
        losses += [(CUDLoss(calibration=bounds, save=save, backend=backend), (t, y)) for save in SAVES]
        for loss, others in losses:
            torch.autograd.grad(2 * loss(x, *others), x)


def shapes_of(place: Place, backend: BackendName, dtype: torch.dtype) -> Iterator[Shape]:
    """Rows of every kind."""
    yield from place.watched
    if backend == "cuda":
        for _, shape in place.layouts(dtype):
            yield shape


def main(arguments: list[str]) -> int:
    """BACKEND DTYPE [N V]: with a shape, one call of the student loss whose labels all count."""
    backend, dtype = arguments[0], getattr(torch, arguments[1])
    place = gpu() if torch.cuda.is_available() else stand_in()
    known: dict[str, BackendName] = {"triton": "triton", "cuda": "cuda"}
    if len(arguments) == 2:
        every_kernel(known[backend], dtype, place.device, shapes_of(place, known[backend], dtype))
    else:
        n, v = map(int, arguments[2:])
        logits = partial(torch.randn, n, v, dtype=dtype, device=place.device)
        x, y = logits(requires_grad=True), torch.randint(v, (n,), device=place.device)
        torch.autograd.grad(CUDLoss(TEMPERATURE, backend=known[backend])(x, logits(), y), x)
    if place.device == "cuda":
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
