"""The losses from hidden states against the losses of logits: tiles, gradients, masks, dtypes, peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cudfast import (
    CUDOptions,
    DUSLoss,
    DUSOptions,
    FusedLinearDUSLoss,
    LinearOptions,
    Projection,
    backends,
)
from cudfast.functional import cud_loss
from cudfast.linear import fused_linear_cud_loss, fused_linear_dus_loss, tiles
from cudfast.linear.tiles import Cost, choose

from .hidden import DS, ROOMS, Batch, N, V, budget, close, f64, grads
from .truth import cud_rows, dus_rows


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """The interpreter of Triton kernels takes seconds at these sizes: it has a test of its own."""
    return str(request.param)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("save", ["state", "auto"])
@pytest.mark.parametrize("room", ROOMS)
def test_equals_the_loss_of_the_logits(backend: str, reduction: str, save: str, room: str) -> None:
    for dtype, tolerance in ((f64, 1e-12), (torch.float32, 2e-6)):
        x = Batch(dtype)
        upstream = torch.rand(N, dtype=dtype) if reduction == "none" else torch.tensor(0.37, dtype=dtype)
        loss = x.fused(budget=budget(room, backend), reduction=reduction, save=save, backend=backend)
        plain = cud_loss(*x.logits(), x.labels, CUDOptions(reduction=reduction, backend=backend))
        close((loss,), (plain,), tolerance)
        close(grads(loss, x.leaves, upstream), grads(plain, x.leaves, upstream), tolerance)


@pytest.mark.parametrize("room", ROOMS)
def test_scale_soft_cap_and_statistics(backend: str, room: str) -> None:
    x = Batch()
    linear = LinearOptions(
        memory_budget=budget(room, backend), scale=0.5, softcap=3.0, teacher_scale=2.0, teacher_softcap=7.0
    )
    s, t = x.logits()
    s, t = 3 * torch.tanh(s * 0.5 / 3), 7 * torch.tanh(t * 2 / 7)
    options = CUDOptions(temperature=3.0, backend=backend)
    loss, stats = fused_linear_cud_loss(x.h, x.w, x.labels, options, linear, **x.kwargs, return_stats=True)
    plain, expected = cud_loss(s, t, x.labels, options, return_stats=True)
    close((loss, *grads(loss, x.leaves)), (plain, *grads(plain, x.leaves)))
    for name, a, b in zip(expected._fields, stats, expected):
        torch.testing.assert_close(a, b, equal_nan=True, msg=name)


@pytest.mark.parametrize("room", ROOMS)
def test_teacher_loss(backend: str, room: str) -> None:
    x, alpha = Batch(), torch.rand(V, dtype=f64) + 0.5
    x.labels[1] = 4999
    for reduction in ("mean", "none"):
        kwargs: dict[str, Any] = {"gamma": 2.0, "alpha": alpha, "reduction": reduction, "backend": backend}
        fused = FusedLinearDUSLoss(**kwargs, memory_budget=budget(room, backend), logit_softcap=5.0)
        loss, stats = fused(x.h, x.w, x.labels, head_bias=x.b, return_stats=True)
        s = 5 * torch.tanh(x.logits()[0] / 5)
        plain, expected = DUSLoss(**kwargs)(s, x.labels, return_stats=True)
        close((loss,), (plain,))
        close(grads(loss.sum(), x.leaves), grads(plain.sum(), x.leaves))
        torch.testing.assert_close(stats, expected, equal_nan=True)
        rows = dus_rows(s, x.labels, gamma=2.0, alpha=alpha)
        close((loss,), (rows.sum() / (x.labels >= 0).sum(),) if reduction == "mean" else (rows,))


@pytest.mark.parametrize("save", ["state", "auto"])
def test_small_tiles_on_every_backend(save: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """23 classes in tiles of 8, two rows at a time."""
    x = Batch(f64, 5, classes=23)
    linear = LinearOptions(softcap=5.0)
    found = []
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: tiles.Tile(2, 8))
    for name in ("native", "triton", "reference"):
        if isinstance(backends.load(name), str):
            continue
        options = CUDOptions(backend=name, save=save, temperature=3.0)  # type: ignore[arg-type]
        loss = fused_linear_cud_loss(x.h, x.w, x.labels, options, linear, **x.kwargs)
        dus = fused_linear_dus_loss(
            x.h,
            x.w,
            x.labels.clamp(min=0),
            DUSOptions(backend=name, save=save),
            linear,  # type: ignore[arg-type]
        )
        found.append((loss, dus, *grads(loss + dus, x.leaves)))
    plain = cud_loss(5 * torch.tanh(x.logits()[0] / 5), x.logits()[1], x.labels, CUDOptions(temperature=3.0))
    for other in found:
        close(other[:1], (plain,))
        close(other, found[0])


def test_tiles_whose_first_class_has_the_number_of_a_special_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 is a class that no row has, as padding is; a label of another tile must not be taken for it."""
    x = Batch(f64, 5, classes=23)
    x.labels = torch.tensor([22, 0, 9, 2, 16])
    monkeypatch.setattr(tiles, "choose", lambda *_, **__: tiles.Tile(5, 8))
    options = CUDOptions(ignore_index=0, unlabeled_index=2)
    loss = fused_linear_cud_loss(x.h, x.w, x.labels, options, **x.kwargs)
    plain = cud_loss(*x.logits(), x.labels, options)
    close((loss, *grads(loss, x.leaves)), (plain, *grads(plain, x.leaves)))


def test_against_the_equations(backend: str) -> None:
    x = Batch()
    kd, ce = cud_rows(*x.logits(), x.labels)
    truth = kd.sum() / (N - 1) + ce.sum() / (N - 2)
    for room in ("auto", "both"):
        loss = x.fused(budget=budget(room, backend), backend=backend)
        close((loss, *grads(loss, x.leaves)), (truth, *grads(truth, x.leaves)))


@pytest.mark.parametrize("save", ["auto", "state"])
def test_gradcheck(backend: str, save: str) -> None:
    x = Batch(f64, 5, classes=11)
    linear = LinearOptions(softcap=4.0, scale=1.5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: fused_linear_cud_loss(
            h, w, x.labels, CUDOptions(save=save, backend=backend), linear, **{**x.kwargs, "student_bias": b}
        ),
        x.leaves,
    )


def test_chunks_of_one_row_and_more_rows_than_there_are() -> None:
    """Given logits and no bias: nothing but the student's own logits takes memory."""
    x = Batch(torch.float32)
    teacher = x.logits()[1]
    chosen = []
    for bytes_ in (120_000, 700_000, 1 << 30):
        linear = LinearOptions(memory_budget=bytes_)
        x.labels = torch.randint(V, (N,))
        near = Projection(min_near_mass=0.1)  # keeps rows whole
        loss = fused_linear_cud_loss(x.h, x.w, x.labels, CUDOptions(calibration=near), linear, teacher_logits=teacher)
        plain = cud_loss(x.h @ x.w.t(), teacher, x.labels, CUDOptions(calibration=near))
        close((loss, *grads(loss, (x.h, x.w))), (plain, *grads(plain, (x.h, x.w))), 2e-6)
        cost = Cost(4, 0, 0, 0)
        chosen.append(choose(N, V, cost, bytes_, whole=True).rows)
    assert chosen[0] <= 6
    assert chosen[-1] == N


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 9000),
    bytes_=st.integers(100_000, 1_500_000),
    capped=st.booleans(),
    strided=st.booleans(),
)
def test_any_shape_in_any_budget(rows: int, classes: int, bytes_: int, capped: bool, strided: bool) -> None:
    x = Batch(f64, rows, classes=classes)
    if strided:  # what a shifted language model hands over
        wide = torch.randn(rows, 3, DS, dtype=f64).requires_grad_()
        x.h = wide[:, 1]
        x.w = torch.randn(DS, classes, dtype=f64).requires_grad_().t()
    softcap = 6.0 if capped else None
    linear = LinearOptions(memory_budget=bytes_, softcap=softcap)
    try:
        loss = x.fused(linear=linear)
    except ValueError as error:
        smallest = int(str(error).split("works here is ")[1].split()[0].replace(",", ""))
        assert smallest > bytes_
        loss = x.fused(linear=LinearOptions(memory_budget=smallest, softcap=softcap))
    s, t = x.logits()
    plain = cud_loss(s if softcap is None else softcap * torch.tanh(s / softcap), t, x.labels)
    close((loss, *grads(loss, x.leaves)), (plain, *grads(plain, x.leaves)))


def test_the_choice_of_a_tile() -> None:
    """Rows while enough of them fit, then classes; a carried sum only where chunks of rows follow each other."""
    cost = Cost(logit=8, row=100, fixed=1000, carried=0)
    big = 256 << 20
    assert choose(1024, 65_536, cost, big, whole=False) == (352, 65_536)
    assert choose(64, 151_936, cost, big, whole=False) == (64, 151_936)
    rows, classes = choose(8, 100_000_000, cost, big, whole=False)
    assert rows == 8
    assert classes == 4_000_000  # 25 equal tiles
    assert choose(1024, 1_000_000, cost, big, whole=False) == (32, 1_000_000)
    assert choose(1024, 2_000_000, cost, big, whole=False).rows == 1024
    assert choose(1024, 2_000_000, cost, big, whole=True) == (16, 2_000_000)
    heavy = cost._replace(carried=1 << 40)
    assert choose(1024, 65_536, heavy, big, whole=False).rows == 1024
    for whole in (False, True):
        with pytest.raises(ValueError, match="smallest budget that works here is") as error:
            choose(7, 30_000, cost, 2000, whole=whole)
        smallest = int(str(error.value).split("here is ")[1].split()[0].replace(",", ""))
        assert choose(7, 30_000, cost, smallest, whole=whole).rows >= 1
        with pytest.raises(ValueError, match="smallest budget"):
            choose(7, 30_000, cost, smallest - 1, whole=whole)


def test_budget_too_small() -> None:
    x = Batch(torch.float32)
    with pytest.raises(ValueError, match=r"memory_budget=1,000 bytes are too few for one row of 2,048 logits") as error:
        x.fused(budget=1000)
    smallest = int(str(error.value).split("works here is ")[1].split()[0].replace(",", ""))
    assert x.fused(budget=smallest).isfinite()
    message = r"one row of 5,000 logits and its buffers \(calibration=Projection\(\.\.\.\) needs whole rows\)"
    with pytest.raises(ValueError, match=message):
        x.fused(budget=smallest, calibration=Projection(min_near_mass=0.2))


@pytest.mark.parametrize("needed", range(1, 8))
@pytest.mark.parametrize("save", ["auto", "state"])
def test_any_subset_requires_grad(needed: int, save: str) -> None:
    x = Batch()
    leaves = tuple(leaf for i, leaf in enumerate(x.leaves) if needed >> i & 1)
    for i, leaf in enumerate(x.leaves):
        leaf.requires_grad_(bool(needed >> i & 1))
    plain = cud_loss(*x.logits(), x.labels)
    for room in ("auto", "both"):
        loss = x.fused(budget=budget(room), save=save)
        close(grads(loss, leaves), grads(plain, leaves))


def test_frozen_weights_cost_nothing() -> None:
    """No product for them, no memory for them: three products and not four."""
    x = Batch(torch.float32)
    counted = []
    for frozen in (False, True):
        x.w.requires_grad_(not frozen)
        x.b.requires_grad_(not frozen)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            x.fused().backward()
        counted.append(sum(e.count for e in profile.key_averages() if e.key in ("aten::addmm", "aten::addmm_")))
    assert counted == [4, 3]


def test_only_rows_that_count_are_multiplied() -> None:
    """NaN in the hidden states of ignored rows reaches nothing."""
    x = Batch()
    x.labels[:] = -100
    x.labels[[2, 7]] = 5
    weight = torch.ones(N)
    weight[7] = 0
    with torch.no_grad():
        x.h[x.labels == -100] = torch.nan
        x.th[x.labels == -100] = torch.nan
        x.h[7] = torch.nan
    loss = fused_linear_cud_loss(x.h, x.w, x.labels, **x.kwargs, weight=weight)
    g = grads(loss, x.leaves)
    row = x.h[2:3].detach().requires_grad_()
    plain = cud_loss(row @ x.w.t() + x.b, x.th[2:3] @ x.tw.t() + x.tb, x.labels[2:3])
    close((loss, g[0][2:3], *g[1:]), (plain, *grads(plain, (row, x.w, x.b))))
    assert g[0][:2].eq(0).all()
    assert g[0][3:].eq(0).all()


@pytest.mark.parametrize("room", ["auto", "both"])
def test_all_ignored(backend: str, room: str) -> None:
    x = Batch()
    x.labels[:] = -100
    for reduction in ("mean", "none"):
        loss = x.fused(budget=budget(room, backend), reduction=reduction, backend=backend)
        assert loss.eq(0).all()
        assert all(g.eq(0).all() for g in grads(loss.sum(), x.leaves))
    empty = Batch(f64, 0)
    loss = empty.fused(backend=backend)
    assert loss.item() == 0
    assert [tuple(g.shape) for g in grads(loss, empty.leaves)] == [(0, DS), (V, DS), (V,)]


def test_given_teacher_logits_with_ignored_rows() -> None:
    x = Batch()
    teacher = torch.randn(N, V + 3, dtype=f64)
    for room in ROOMS:
        linear = LinearOptions(memory_budget=budget(room))
        options = CUDOptions(num_classes=V - 2)
        loss = fused_linear_cud_loss(x.h, x.w, x.labels, options, linear, student_bias=x.b, teacher_logits=teacher)
        plain = cud_loss(x.logits()[0], teacher, x.labels.clamp(max=V - 3), options)
        x.labels.clamp_(max=V - 3)
        g = grads(loss, x.leaves)
        close((loss, *g), (plain, *grads(plain, x.leaves)))
        assert g[1][V - 2 :].eq(0).all()


def test_weights_temperatures_num_items_and_leading_shapes() -> None:
    x = Batch(f64, 3, 4)
    weight, tau = torch.rand(3, 4), torch.rand(3, 4) + 1
    more: dict[str, Any] = {"weight": weight, "temperature": tau}
    s, t = x.logits()
    for room in ROOMS:
        for items in (None, 7, torch.tensor(5.0)):
            for reduction in ("mean", "none"):
                linear, options = LinearOptions(memory_budget=budget(room)), CUDOptions(reduction=reduction)
                loss = fused_linear_cud_loss(x.h, x.w, x.labels, options, linear, **x.kwargs, **more, num_items=items)
                plain = cud_loss(s, t, x.labels, options, **more, num_items=items)
                assert loss.shape == plain.shape
                close((loss,), (plain,))
                close(grads(loss.sum(), x.leaves), grads(plain.sum(), x.leaves))
    one = fused_linear_cud_loss(x.h[1, 2], x.w, x.labels[1, 2], **{**x.kwargs, "teacher_hidden": x.th[1, 2]})
    close((one,), (cud_loss(s[1, 2], t[1, 2], x.labels[1, 2]),))


def test_cross_entropy_against_torch() -> None:
    """KD weight 0: PyTorch's own loss, and its fused one where it has it, as oracles. No teacher is asked for."""
    x = Batch(torch.float32)
    x.labels[1] = 2
    loss = fused_linear_cud_loss(x.h, x.w, x.labels, CUDOptions(kd_weight=0, ce_weight=1), student_bias=x.b)
    plain = F.cross_entropy(x.logits()[0], x.labels)
    close((loss, *grads(loss, x.leaves)), (plain, *grads(plain, x.leaves)), 2e-6)
    if hasattr(F, "linear_cross_entropy"):
        other = F.linear_cross_entropy(x.h, x.w, x.labels, linear_bias=x.b)
        close((loss,), (other,), 2e-6)


def test_kl_against_a_distillation_of_chunks_by_hand() -> None:
    """Plain KD: torch's KLDivLoss of the same logits."""
    x = Batch()
    x.labels[:] = -1
    s, t = x.logits()
    plain = 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="batchmean", log_target=True)
    for room in ROOMS:
        loss = x.fused(budget=budget(room), kd_weight=1.0, calibration=None)
        close((loss,), (plain,))


def test_against_liger_kernel() -> None:
    """Plain KD and cross-entropy at temperature 1, where the two losses coincide."""
    peer = pytest.importorskip("liger_kernel.chunked_loss")
    x = Batch(torch.float32)
    x.labels[1] = 7
    loss = x.fused(temperature=1.0, calibration=None)
    for chunk in (16, 1024):
        other = peer.LigerFusedLinearJSDLoss(0.2, 0.8, 0.0, temperature=1.0, compiled=False, chunk_size=chunk)
        value = other(x.h, x.w, x.th, x.tw, x.labels, x.b, x.tb)
        close((loss, *grads(loss, x.leaves)), (value, *grads(value, x.leaves)), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_no_worse_than_eager(dtype: torch.dtype) -> None:
    """Sums over chunks in f32: against f64 of the same numbers, errors at most those of logits in the short dtype."""
    rows = 96
    x = Batch(dtype, rows, classes=3000)
    wide = Batch(f64, rows, classes=3000)
    for a, b in zip((*wide.leaves, wide.th, wide.tw, wide.tb), (*x.leaves, x.th, x.tw, x.tb)):
        a.data.copy_(b.data)
    wide.labels = x.labels
    true = cud_loss(*wide.logits(), x.labels)
    true_g = grads(true, wide.leaves)
    s, t = F.linear(x.h, x.w, x.b), F.linear(x.th, x.tw, x.tb)
    eager = cud_loss(s, t, x.labels)
    eager_g = grads(eager, x.leaves)
    for bytes_ in ("auto", 2_000_000, 1_000_000):
        loss = x.fused(budget=bytes_)
        assert loss.dtype == torch.float32
        found = grads(loss, x.leaves)
        for got, plain, wanted in zip((loss, *found), (eager, *eager_g), (true, *true_g)):
            ours, theirs = (float((v.detach().double() - wanted.detach()).abs().max()) for v in (got, plain))
            assert ours <= theirs * 1.05 + torch.finfo(torch.float32).eps


def test_accumulate_dtype() -> None:
    x = Batch(torch.float32, 64, classes=3000)
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        loss = x.fused(linear=LinearOptions(memory_budget=2_500_000, accumulate_dtype=dtype))
        found.append(grads(loss, x.leaves))
    close(found[1], found[0], 2e-6)
    close(found[2], found[0], 0)  # never narrower than the weight itself
