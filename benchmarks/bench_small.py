"""Batches so small that what surrounds the arithmetic decides."""

from __future__ import annotations

import pytest
import torch

from cudfast.bench.cases import make
from cudfast.bench.contestants import CUD, DUS, Entry, yardsticks
from cudfast.bench.shapes import SHAPES

from . import peers
from .conftest import Runner
from .rounds import COMPILE, NOT_COMPILED, SMALL_ROUNDS, SMALL_WARM


@pytest.mark.benchmark(group="small batches")
@pytest.mark.parametrize("entry", [CUD, DUS], ids=lambda entry: entry.title)
def bench_small(race: Runner, entry: Entry) -> None:
    shape = SHAPES["Banking77"]
    data = make(shape)
    fresh, *others = sorted(entry.ours(data), key=lambda c: c.name != "fresh gradient")
    entry.check([fresh, *others], data)
    found, absent = peers.distillation(data) if entry is CUD else ([], {})
    floor = entry.floor(data)
    race(
        entry.title,
        shape,
        torch.float32,
        [fresh, *others, *entry.pytorch(data, compile=COMPILE), *found, *yardsticks(data), floor],
        floor=floor.name,
        rounds=SMALL_ROUNDS,
        warm=SMALL_WARM,
        absent={**absent, **NOT_COMPILED},
        at_least=[("eager PyTorch", fresh.name, 3, None)] if entry is CUD else (),
    )
