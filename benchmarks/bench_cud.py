"""CUDLoss, forward and backward, against what else one could use."""

from __future__ import annotations

import pytest
import torch

from cudfast.bench.cases import make, through, with_gradient
from cudfast.bench.contestants import CE, CUD, Contestant, yardsticks
from cudfast.bench.shapes import SHAPES

from . import peers
from .conftest import Runner
from .rounds import COMPILE, NOT_COMPILED, QUICK, ROUNDS

LARGE = ("Llama 2", "Llama 3")
SIXTEEN_BITS = (("Llama 2", torch.bfloat16), ("Llama 3", torch.bfloat16), ("Llama 2", torch.float16))
EVERYBODY = ("ImageNet", "Llama 2", "Llama 3", "Qwen", "Gemma", "Amazon-3M", "10M", "100M")


@pytest.mark.benchmark(group="CUDLoss, float32")
@pytest.mark.parametrize("name", LARGE[:1] if QUICK else EVERYBODY)
def bench_float32(race: Runner, name: str) -> None:
    shape = SHAPES[name]
    data = make(shape)
    ours = CUD.ours(data)
    CUD.check(ours, data)
    huge = name == "100M"  # losses with temporaries need seconds and gigabytes
    found, absent = peers.distillation(data, skip="takes some 3 GB and seconds" if huge else "")
    own = CUD.pytorch(data, compile=COMPILE and not huge)
    contestants = [*ours, *own, *found, *yardsticks(data), CUD.floor(data)]
    goals = [("eager PyTorch", form, 30, 50) for form in ("given gradient", "in place")]
    goals += [("torch.compile", form, 12, 20) for form in ("given gradient", "in place")]
    goals += [("eager PyTorch", "fresh gradient", 12, 20), ("torch.compile", "fresh gradient", 5, 8)]
    race(
        CUD.title,
        shape,
        torch.float32,
        contestants,
        floor="torch.add",
        rounds=3 if huge else ROUNDS,
        absent={**absent, **NOT_COMPILED, **({"torch.compile": "left out: as eager"} if huge else {})},
        at_least=[goal for goal in goals if name in LARGE and (COMPILE or goal[0] != "torch.compile")],
        at_most=[(form, "torch.add", 2.5, 1.5) for form in ("given gradient", "in place")] if name in LARGE else (),
    )


@pytest.mark.benchmark(group="CUDLoss, 16 bits")
@pytest.mark.parametrize(("name", "dtype"), SIXTEEN_BITS[:1] if QUICK else SIXTEEN_BITS, ids=str)
def bench_sixteen_bits(race: Runner, name: str, dtype: torch.dtype) -> None:
    data = make(SHAPES[name], dtype)
    ours = CUD.ours(data)
    CUD.check(ours, data)
    contestants = [*ours, *CUD.pytorch(data, compile=COMPILE and dtype == torch.bfloat16), CUD.floor(data)]
    race(
        CUD.title,
        SHAPES[name],
        dtype,
        contestants,
        floor="torch.add",
        rounds=ROUNDS,
        absent=NOT_COMPILED if dtype == torch.bfloat16 else {"torch.compile": "left out: raced in bfloat16"},
        at_least=[("eager PyTorch", form, 20, None) for form in ("given gradient", "in place")],
    )


@pytest.mark.benchmark(group="CUDLoss, cross-entropy only")
def bench_cross_entropy(race: Runner) -> None:
    shape = SHAPES["Llama 2"]
    data = make(shape)
    ours = CE.ours(data)
    CE.check(ours, data)
    plain = Contestant("F.cross_entropy", with_gradient(through(CE.plain, data.student, data.labels)), reads=1)
    race(CE.title, shape, torch.float32, [*ours, plain, CE.floor(data)], floor="torch.neg", rounds=ROUNDS)
