"""W-Clip at every temperature: where the teacher's top-1 dominates its tempered sums, too.

The clip takes mass from the top-1. A sum that consists of almost nothing else cannot lose it by subtraction, so such
rows are summed again without it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cudfast import CUDLoss, FusedLinearLoss, Loss, WClip, backends
from cudfast.linear import tiles
from cudfast.options import BackendName
from cudfast.terms import ForwardKL

f64 = torch.float64
BACKENDS = [name for name in ("native", "reference", "triton") if not isinstance(backends.load(name), str)]
TEMPERATURES = [1e-4, 1e-3, 0.01, 0.05, 0.2, 1 / 3, 0.5, 1.0, 2.5, 50.0, 1e4]


def target_of(teacher: Tensor, labels: Tensor, budget: float, margin: float) -> Tensor:
    """Log of the clipped distribution in f64, up to a constant: Eq. 4-8 without a difference of large numbers."""
    t = teacher.to(f64)
    m, k = t.max(-1)
    u = (t.gather(-1, labels[:, None]).squeeze(-1) - m).clamp(min=-1e4)
    r = torch.minimum(torch.full_like(u, budget), -margin * torch.expm1(u))
    wrong = (r > 0)[:, None]
    classes = torch.arange(t.shape[-1])
    top, right = classes == k[:, None], classes == labels[:, None]
    t = torch.where(wrong & top, (m + torch.log1p(-r))[:, None], t)
    return torch.where(wrong & right, (m + (u.exp() + r).log())[:, None], t)


def truth_of(
    student: Tensor, teacher: Tensor, labels: Tensor, tau: Tensor, budget: float, margin: float
) -> tuple[Tensor, Tensor]:
    """Divergences (N,) and their gradients (N, V) in f64."""
    tau = tau[:, None]
    q = (target_of(teacher, labels, budget, margin) / tau).log_softmax(-1)
    p = (student.to(f64) / tau).log_softmax(-1)
    kl = torch.where(q == -torch.inf, 0, q.exp() * (q - p)).sum(-1)
    return tau.squeeze(-1) ** 2 * kl, tau * (p.exp() - q.exp())


def rows_of(seed: int, N: int, V: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Students, teachers and wrong labels; the teacher's top-1 is clear in some rows and shared in others."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(N, V, generator=generator) for _ in range(2))
    labels = torch.randint(V, (N,), generator=generator)
    t[: N // 3, 0] = t[: N // 3].amax(-1) + 5 * torch.rand(N // 3, generator=generator)
    s[::4] = t[::4] + 0.1 * s[::4] / scale
    return s.clamp(-80, 80), t.clamp(-80, 80), labels


def check(value: Tensor, gradient: Tensor, truth: tuple[Tensor, Tensor], tau: Tensor) -> None:
    """The documented bounds of f32."""
    kl, slope = truth
    limit = 2e-6 * torch.maximum(torch.ones_like(kl), torch.maximum(tau**2, kl.abs()))
    assert bool(((value.to(f64) - kl).abs() <= limit).all()), ((value - kl).abs() / limit).max()
    wrong = (gradient.to(f64) - slope).abs().amax(-1) / tau.clamp(min=1)
    assert bool((wrong <= 2e-6).all()), wrong.max()


@pytest.mark.parametrize("budget, margin", [(0.5, 0.7), (0.0, 1.0), (0.9, 1.0), (0.999, 0.3), (0.01, 0.05)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_temperature(backend: BackendName, budget: float, margin: float) -> None:
    for number, tau in enumerate(TEMPERATURES):
        for V, scale in ((2, 1.0), (5, 20.0), (70, 3.0)):
            s, t, labels = rows_of(number, 12, V, scale)
            s.requires_grad_()
            loss = Loss(ForwardKL(tau), calibration=WClip(budget, margin), reduction="none", backend=backend)
            value = loss(s, t, labels)
            (gradient,) = torch.autograd.grad(value.sum(), s)
            per_row = torch.full((12,), tau, dtype=f64)
            check(value.detach(), gradient, truth_of(s.detach(), t, labels, per_row, budget, margin), per_row)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_per_row(backend: BackendName) -> None:
    s, t, labels = rows_of(3, 44, 9, 2.0)
    tau = torch.tensor(TEMPERATURES * 4, dtype=f64)
    s.requires_grad_()
    loss = Loss(ForwardKL(), calibration=WClip(), reduction="none", backend=backend)
    value = loss(s, t, labels, temperature=tau)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    check(value.detach(), gradient, truth_of(s.detach(), t, labels, tau, 0.5, 0.7), tau)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reported_example(backend: BackendName) -> None:
    t = torch.full((1, 16), 0.1 / 15).log()
    t[0, 0] = math.log(0.9)
    x = torch.zeros(1, 16, requires_grad=True)
    loss = CUDLoss(0.01, backend=backend)(x, t, torch.tensor([5]))
    assert loss.item() == pytest.approx(0.55470, abs=1e-5)


@pytest.mark.parametrize("given", ["logits", "hidden states"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles(backend: BackendName, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes in tiles: the sums without the top-1 are those of all tiles."""
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: tiles.Tile(5, 8))
    N, V, D = 6, 90, 4
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    other, head = torch.randn(N, D, generator=generator), 2 * torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[0] = -1
    hidden.requires_grad_()
    teacher = {"teacher_hidden": other, "teacher_weight": head}
    if given == "logits":
        teacher = {"teacher_logits": other @ head.t()}
    for tau in (0.01, 0.1, 0.3):
        options = {"calibration": WClip(0.9, 1.0), "reduction": "none", "backend": backend}
        fused = FusedLinearLoss(ForwardKL(tau), **options)  # type: ignore[arg-type]
        (found,) = torch.autograd.grad(fused(hidden, weight, labels, **teacher).sum(), hidden)
        whole = Loss(ForwardKL(tau), **options)(hidden @ weight.t(), other @ head.t(), labels)  # type: ignore[arg-type]
        (wanted,) = torch.autograd.grad(whole.sum(), hidden)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
