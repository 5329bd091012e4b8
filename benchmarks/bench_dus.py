"""DUSLoss, forward and backward, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from .bench_cud import BANKING, LARGE, ROUNDS, SLOW_ROUNDS, SMALL_ROUNDS, SMALL_WARM, check
from .cases import compiled, dus_cases, eager_dus, make, through, with_gradient
from .measure import Contestant, Race, Shape


@pytest.mark.benchmark(group="DUSLoss")
@pytest.mark.parametrize("shape", [LARGE[0], BANKING], ids=str)
def bench_dus(race: Race, shape: Shape) -> None:
    small = shape is BANKING
    data = make(shape)
    cases = [
        Contestant(name, with_gradient(forward), data.restore if name == "in place" else lambda: None, reads=1)
        for name, forward in dus_cases(data).items()
    ]
    check(cases, eager_dus, data, data.labels)
    slow = 1 if small else ROUNDS // SLOW_ROUNDS
    student = data.plain
    peers = [
        Contestant(name, with_gradient(through(loss, data.student, data.labels)), reads=1, every=slow)
        for name, loss in (("eager PyTorch", eager_dus), ("torch.compile", compiled(eager_dus)))
    ]
    neg = Contestant("torch.neg", lambda: torch.neg(student, out=data.gradient), reads=1)
    race.run(
        "DUSLoss",
        shape,
        torch.float32,
        [*cases, *peers, neg],
        floor="torch.neg",
        rounds=SMALL_ROUNDS if small else ROUNDS,
        warm=SMALL_WARM if small else 0,
    )
