"""The temperature at which a bound on the entropy is met: found, in at most twelve sweeps, on awkward rows too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cudfast import Projection, calibrate
from cudfast.rows.call import Constraints
from cudfast.targets.calibration import project

f64 = torch.float64


@pytest.mark.parametrize("name", ["min_entropy", "max_entropy"])
@pytest.mark.parametrize("scale", [0.5, 6.0])
@pytest.mark.parametrize("V", [10, 40])
def test_the_temperature_is_found(V: int, scale: float, name: str) -> None:
    """A bound within reach is met with equality, also where the entropy is flat and then steep in the temperature."""
    N = 15_000 // V
    t, labels = scale * torch.randn(N, V, dtype=f64), torch.randint(V, (N,))
    masses: dict[str, Any] = {"min_near_mass": 0.3, "max_wrong_mass": 0.3, "on_infeasible": "relax"}

    def entropies(**bound: Any) -> Tensor:
        terms: Tensor = torch.special.entr(calibrate(t, labels, Projection(**masses, **bound)))
        return terms.sum(-1)

    free, end = entropies(), entropies(**{name: 100.0 if name == "min_entropy" else 0.0})
    wanted = free + (end - free) * (0.05 + 0.9 * torch.rand(N, dtype=f64))
    torch.testing.assert_close(entropies(**{name: wanted}), wanted, rtol=0, atol=1e-8)


def awkward(V: int, N: int) -> Tensor:
    """Rows whose entropy is flat, steep, and flat again in the temperature, or a line, or has steps."""
    normal, ranks = torch.randn(N, V, dtype=f64), torch.arange(1, V + 1, dtype=f64)
    peak = torch.where(torch.arange(V) == V // 2, 1.0, 0.0)
    scales = (10 ** torch.empty(N, 1, dtype=f64).uniform_(-1, 2)).expand(N, V)
    kinds = [
        normal * scales,
        normal + peak * 2 * scales,
        -ranks.log() * scales.clamp(max=5),
        -ranks * scales / 50,
        torch.randint(3, (N, V)) * scales,
        normal * 2 + (ranks <= V // 5) * scales.clamp(max=20),
    ]
    return torch.stack(kinds)[torch.arange(N) % len(kinds), torch.arange(N)]


@pytest.mark.parametrize("name", ["min_entropy", "max_entropy"])
@pytest.mark.parametrize("V", [3, 40, 500])
def test_twelve_sweeps_are_enough(V: int, name: str) -> None:
    N = min(1_800, 60_000 // V)
    t, labels = awkward(V, N), torch.randint(V, (N,))
    bounds = torch.full((N, 4), torch.nan, dtype=f64)
    bounds[::2, 0], bounds[::3, 1] = 0.3, 0.3
    column, sign = (2, 1) if name == "min_entropy" else (3, -1)

    def found(wanted: Tensor) -> tuple[Tensor, int]:
        given = bounds.clone()
        given[:, column] = wanted
        made = project(
            t, labels >= 0, labels, Constraints(None, None, top1=True, bounds=given, relax=True, entropy=True)
        )
        return torch.special.entr(made.logits.softmax(-1)).sum(-1), made.sweeps

    free, _ = found(torch.full((N,), -100.0 * sign, dtype=f64))
    end, _ = found(torch.full((N,), 100.0 * sign, dtype=f64))
    wanted = free + (end - free) * torch.rand(N, dtype=f64).pow(3)
    got, sweeps = found(wanted)
    assert 3 < sweeps <= 12
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
