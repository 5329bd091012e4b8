"""DUSLoss, forward and backward, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from cudfast.bench.cases import make
from cudfast.bench.contestants import DUS
from cudfast.bench.shapes import SHAPES

from .conftest import Runner
from .rounds import COMPILE, NOT_COMPILED, QUICK, ROUNDS


@pytest.mark.benchmark(group="DUSLoss")
@pytest.mark.parametrize("dtype", [torch.float32] if QUICK else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama 2"] if QUICK else ["ImageNet", "Llama 2"])
def bench_dus(race: Runner, name: str, dtype: torch.dtype) -> None:
    data = make(SHAPES[name], dtype)
    ours = DUS.ours(data)
    DUS.check(ours, data)
    contestants = [*ours, *DUS.pytorch(data, compile=COMPILE), DUS.floor(data)]
    race(DUS.title, SHAPES[name], dtype, contestants, floor="torch.neg", rounds=ROUNDS, absent=NOT_COMPILED)
