"""The meaning of a call's arguments, on both backends: reductions, masks, weights, temperatures, widths, statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cudfast import CUDLoss, CUDOptions, DUSLoss, DUSOptions, WClip
from cudfast.functional import cud_loss, dus_loss

from .batches import batch as small_batch
from .conftest import BUILT
from .truth import calibrated, cud_rows, dus_rows, gradient

f64 = torch.float64
N, V = 8, 21
of_gpus = pytest.mark.parametrize("backend", [name for name in BUILT if name in ("triton", "cuda")])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.tensor([3, -1, 0, 20, -100, 7, -1, 5])
    return 3 * torch.randn(N, V, dtype=f64), 3 * torch.randn(N, V, dtype=f64), labels


def test_mean_divides_each_term_by_its_own_rows(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    kd, ce = cud_rows(student, teacher, labels)
    loss = cud_loss(student, teacher, labels, CUDOptions(backend=backend))
    torch.testing.assert_close(loss, kd.sum() / 7 + ce.sum() / 5)
    none = cud_loss(student, teacher, labels, CUDOptions(reduction="none", backend=backend))
    torch.testing.assert_close(none, kd + ce)
    total = cud_loss(student, teacher, labels, CUDOptions(reduction="sum", backend=backend))
    torch.testing.assert_close(total, (kd + ce).sum())


def test_batchmean_is_mean() -> None:
    assert CUDLoss(reduction="batchmean").options == CUDLoss().options  # type: ignore[arg-type]


def test_weights_weigh_rows_and_divide_means(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    student.requires_grad_()
    weight = torch.rand(N)
    weight[2] = 0
    kd, ce = cud_rows(student, teacher, labels)
    counts, labelled = (labels != -100).to(f64) * weight, (labels >= 0).to(f64) * weight
    expected = (weight * kd).sum() / counts.sum() + (weight * ce).sum() / labelled.sum()
    loss = cud_loss(student, teacher, labels, CUDOptions(backend=backend), weight=weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student))
    dus = dus_loss(student, labels.abs() % V, DUSOptions(backend=backend), weight=weight)
    torch.testing.assert_close(dus, (weight * dus_rows(student, labels.abs() % V)).sum() / weight.sum().to(f64))


def test_a_row_of_weight_zero_counts_for_nothing_even_when_it_is_nan(backend: str) -> None:
    student, teacher, labels = torch.randn(3, V), torch.randn(3, V), torch.tensor([1, 2, 3])
    student[1], weight = torch.nan, torch.tensor([1.0, 0.0, 1.0])
    student.requires_grad_()
    loss = cud_loss(student, teacher, labels, CUDOptions(backend=backend), weight=weight)
    g = gradient(loss, student)
    assert loss.isfinite()
    assert g[1].eq(0).all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_num_items_replaces_both_divisors(backend: str, reduction: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    kd, ce = cud_rows(student, teacher, labels)
    options = CUDOptions(reduction=reduction, backend=backend)
    for items in (16, 16.0, torch.tensor(16), torch.tensor([16.0])):
        loss = cud_loss(student, teacher, labels, options, num_items=items)
        expected = (kd + ce) / 16
        torch.testing.assert_close(loss, expected if reduction == "none" else expected.sum())


def test_accumulation_by_num_items_equals_one_batch(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    options = CUDOptions(backend=backend)
    whole = cud_loss(student, teacher, labels, options, num_items=7)
    parts = [
        cud_loss(student[i : i + 2], teacher[i : i + 2], labels[i : i + 2], options, num_items=7)
        for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_ignored_rows_have_a_gradient_of_exactly_zero(backend: str) -> None:
    student = torch.full((4, V), torch.nan, requires_grad=True)
    teacher, labels = torch.full((4, V), torch.nan), torch.full((4,), -100)
    loss = cud_loss(student, teacher, labels, CUDOptions(backend=backend))
    assert loss.item() == 0.0
    assert gradient(loss, student).eq(0).all()
    loss = dus_loss(student, labels, DUSOptions(backend=backend))
    assert loss.item() == 0.0
    assert gradient(loss, student).eq(0).all()


def test_no_labels_at_all(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, _ = batch
    kd, _ = cud_rows(student, teacher, None)
    options = CUDOptions(backend=backend)
    torch.testing.assert_close(cud_loss(student, teacher, None, options), kd.mean())
    unlabelled = torch.full((N,), -1)
    torch.testing.assert_close(cud_loss(student, teacher, unlabelled, options), kd.mean())


def test_special_labels_can_be_moved(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    moved = torch.where(labels == -100, 255, torch.where(labels == -1, 254, labels))
    options = CUDOptions(ignore_index=255, unlabeled_index=254, backend=backend)
    a, b = cud_loss(student, teacher, moved, options), cud_loss(student, teacher, labels, CUDOptions(backend=backend))
    assert torch.equal(a, b)
    as_class = CUDOptions(ignore_index=0, unlabeled_index=None, backend=backend)  # a real class may be ignored
    kd, ce = cud_rows(student, teacher, torch.where(labels <= 0, -100, labels))
    got = cud_loss(student, teacher, labels.clamp(min=0), as_class)
    torch.testing.assert_close(got, kd.sum() / 4 + ce.sum() / 4)


def test_temperature_of_the_call(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    student.requires_grad_()
    tau = torch.tensor([1.0, 2.0, 4.0, 3.0, 0.5, 1.0, 7.5, 2.0])
    kd, ce = cud_rows(student, teacher, labels, tau=tau)
    expected = kd.sum() / 7 + ce.sum() / 5
    truth = gradient(expected, student)
    for save in ("state", "gradient"):
        loss = CUDLoss(backend=backend, save=save)(student, teacher, labels, temperature=tau)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, student), truth)
    for one in (3, 3.0, torch.tensor(3.0)):
        got = CUDLoss(backend=backend)(student, teacher, labels, temperature=one)
        torch.testing.assert_close(got, CUDLoss(3.0, backend=backend)(student, teacher, labels))


def test_vectors_of_any_layout(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    """float64 vectors need no conversion, so their strides must be respected."""
    student, teacher, labels = batch
    options = CUDOptions(backend=backend)
    weight, tau = torch.rand(2 * N, dtype=f64), torch.rand(2 * N, dtype=f64) + 1
    got = cud_loss(student, teacher, labels, options, weight=weight[::2], temperature=tau[::2])
    dense = cud_loss(student, teacher, labels, options, weight=weight[::2].clone(), temperature=tau[::2].clone())
    assert torch.equal(got, dense)
    three = torch.tensor([3.0], dtype=f64)
    expected = CUDLoss(3.0, backend=backend)(student, teacher, labels)
    for one in (three[0], three.expand(N)):
        torch.testing.assert_close(cud_loss(student, teacher, labels, options, temperature=one), expected)
    for one in (np.float32(3), np.int64(3)):
        torch.testing.assert_close(cud_loss(student, teacher, labels, options, temperature=one), expected)
        assert CUDLoss(one).options.temperature == 3


def test_rows_without_weight_in_any_term_have_no_gradient(backend: str) -> None:
    """Not even where they hold NaN: unlabelled under cross-entropy, or num_items=0 where every row is ignored."""
    student = torch.randn(2, V)
    student[1, 3] = torch.nan
    student.requires_grad_()
    loss = cud_loss(student, None, torch.tensor([1, -1]), CUDOptions(kd_weight=0, check_finite=True, backend=backend))
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()
    ignored = torch.tensor([-100, -100])
    loss = cud_loss(student, torch.randn(2, V), ignored, CUDOptions(backend=backend), num_items=0)
    assert loss == 0
    assert gradient(loss, student).eq(0).all()


def test_a_row_of_nothing_has_a_gradient_of_nan(backend: str) -> None:
    for v in (1, 2, 40):
        student = torch.full((1, v), -torch.inf, requires_grad=True)
        label = torch.tensor([0])
        for tau in (2.0, 3.0):
            loss = cud_loss(student, torch.randn(1, v), label, CUDOptions(temperature=tau, backend=backend))
            assert loss.isnan()
            assert gradient(loss, student).isnan().all()
        assert gradient(dus_loss(student, label, DUSOptions(backend=backend)), student).isnan().all()


def test_leading_shapes(backend: str) -> None:
    student, teacher, labels = torch.randn(2, 3, 4, V), torch.randn(2, 3, 4, V), torch.randint(V, (2, 3, 4))
    options = CUDOptions(reduction="none", backend=backend)
    rows = cud_loss(student, teacher, labels, options)
    assert rows.shape == (2, 3, 4)
    flat = cud_loss(student.reshape(-1, V), teacher.reshape(-1, V), labels.reshape(-1), options)
    assert torch.equal(rows.reshape(-1), flat)
    one = cud_loss(student[1, 2, 3], teacher[1, 2, 3], labels[1, 2, 3], options)
    assert one.shape == ()
    assert torch.equal(one, rows[1, 2, 3])
    assert dus_loss(student, labels, DUSOptions(reduction="none", backend=backend)).shape == (2, 3, 4)


def test_empty_batches(backend: str) -> None:
    student = torch.randn(0, V, requires_grad=True)
    for reduction in ("mean", "sum"):
        loss = cud_loss(
            student,
            torch.randn(0, V),
            torch.empty(0, dtype=torch.int64),
            CUDOptions(reduction=reduction, backend=backend),
        )
        assert loss.item() == 0.0
        assert gradient(loss, student).shape == (0, V)
    loss = cud_loss(student, torch.randn(0, V), None, CUDOptions(reduction="none", backend=backend))
    assert loss.shape == (0,)


def test_one_class_has_no_loss(backend: str) -> None:
    student = torch.randn(3, 1, requires_grad=True)
    loss = cud_loss(student, torch.randn(3, 1), torch.zeros(3, dtype=torch.int64), CUDOptions(backend=backend))
    assert loss.item() == 0.0
    assert gradient(loss, student).eq(0).all()


def test_padded_vocabularies(backend: str) -> None:
    """Columns past num_classes act as -inf and get a zero gradient."""
    student, teacher = torch.randn(5, 30, dtype=f64, requires_grad=True), torch.randn(5, 26, dtype=f64)
    labels = torch.randint(V, (5,))
    expected = cud_loss(student[:, :V], teacher[:, :V].contiguous(), labels, CUDOptions(backend=backend))
    loss = cud_loss(student, teacher, labels, CUDOptions(num_classes=V, backend=backend))
    torch.testing.assert_close(loss, expected)
    g = gradient(loss, student)
    assert g[:, V:].eq(0).all()
    torch.testing.assert_close(g, gradient(expected, student))


def test_classes_that_cannot_happen(backend: str) -> None:
    """-inf on both sides is as if the class were not there."""
    keep = torch.ones(V, dtype=torch.bool)
    keep[[0, 4, 20]] = False
    student, teacher = torch.randn(6, V, dtype=f64), torch.randn(6, V, dtype=f64)
    student[:, ~keep], teacher[:, ~keep] = -torch.inf, -torch.inf
    labels = torch.tensor([1, 2, 3, 5, 6, -1])
    kept = torch.cumsum(keep, 0)[labels.clamp(min=0)] - 1
    kept = torch.where(labels < 0, -1, kept)
    student.requires_grad_()
    loss = cud_loss(student, teacher, labels, CUDOptions(backend=backend))
    expected = cud_loss(student[:, keep], teacher[:, keep], kept, CUDOptions(backend=backend))
    torch.testing.assert_close(loss, expected)
    g = gradient(loss, student)
    assert g[:, ~keep].eq(0).all()
    torch.testing.assert_close(g, gradient(expected, student))
    dus = dus_loss(student[:5], labels[:5], DUSOptions(backend=backend))
    torch.testing.assert_close(dus, dus_loss(student[:5, keep], kept[:5], DUSOptions(backend=backend)))
    assert gradient(dus, student)[:, ~keep].eq(0).all()


def test_a_teacher_may_exclude_what_the_student_does_not(backend: str) -> None:
    student, teacher, labels = torch.randn(4, V, dtype=f64), torch.randn(4, V, dtype=f64), torch.tensor([3, 1, 9, -1])
    teacher[:, [2, 9]] = -torch.inf  # the label of row 2 among them: the clip still gives it mass
    student.requires_grad_()
    kd, ce = cud_rows(student, teacher, labels)
    expected = kd.mean() + ce.sum() / 3
    loss = cud_loss(student, teacher, labels, CUDOptions(backend=backend))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student))


def test_mass_where_the_student_cannot_go_is_infinite(backend: str) -> None:
    student, teacher = torch.randn(3, V), torch.randn(3, V)
    student[1, 4] = -torch.inf
    options = CUDOptions(reduction="none", backend=backend)
    rows = cud_loss(student, teacher, torch.tensor([1, 2, 3]), options)
    assert rows.isfinite().tolist() == [True, False, True]
    assert rows[1] == torch.inf
    teacher[1, 4] = -torch.inf
    assert cud_loss(student, teacher, torch.tensor([1, 2, 3]), options).isfinite().all()
    teacher[1, 0], student[1, 0] = 30.0, 0.0  # a confident wrong top-1, and the label where the student has -inf
    rows = cud_loss(
        student, teacher, torch.tensor([1, 4, 3]), CUDOptions(reduction="none", ce_weight=0, backend=backend)
    )
    assert rows[1] == torch.inf


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(backend: str, value: float) -> None:
    for which in range(2):
        logits = [torch.randn(3, 4100), torch.randn(3, 4100)]
        logits[which][1, 4099] = value
        student, teacher = logits
        student.requires_grad_()
        rows = cud_loss(student, teacher, torch.tensor([1, 2, 3]), CUDOptions(reduction="none", backend=backend))
        assert rows.isnan().tolist() == [False, True, False]
        g = gradient(rows.sum(), student)
        assert g[[0, 2]].isfinite().all()
        assert g[1].isnan().all()


@of_gpus
@pytest.mark.parametrize("label", [21, -7])
def test_what_nobody_reads_on_the_host_makes_its_row_nan(backend: str, label: int) -> None:
    student, teacher = torch.randn(4, V, requires_grad=True), torch.randn(4, V)
    labels = torch.tensor([1, label, 2, 3])
    options = CUDOptions(reduction="none", backend=backend)
    calls: list[dict[str, Any]] = [
        {"labels": labels},
        {"labels": labels.abs() % 21, "weight": torch.tensor([1.0, -1.0, 1.0, 1.0])},
        {"labels": labels.abs() % 21, "temperature": torch.tensor([1.0, 0.0, 2.0, 3.0])},
    ]
    for call in calls:
        rows = cud_loss(student, teacher, call.pop("labels"), options, **call)
        assert rows.isnan().tolist() == [False, True, False, False]
        assert gradient(rows.sum(), student).isnan().any(-1).tolist() == [False, True, False, False]
    rows = dus_loss(student, labels, DUSOptions(reduction="none", backend=backend))
    assert rows.isnan().tolist() == [False, True, False, False]


@of_gpus
@pytest.mark.parametrize("save", ["gradient", "state"])
def test_a_weight_out_of_range_makes_a_mean_nan(backend: str, save: str) -> None:
    """Whatever the weights add up to: 0, less, more, or nothing that is a number."""
    student, teacher, labels = torch.randn(3, V, requires_grad=True), torch.randn(3, V), torch.tensor([1, 2, 3])
    for first in (-1.0, -2.0, -0.5, torch.nan, torch.inf):
        weight = torch.tensor([first, 1.0, 0.0])
        for loss in (
            cud_loss(student, teacher, labels, CUDOptions(backend=backend, save=save), weight=weight),
            cud_loss(student, teacher, None, CUDOptions(backend=backend, save=save), weight=weight),
            dus_loss(student, labels, DUSOptions(backend=backend, save=save), weight=weight),
        ):
            assert loss.isnan(), first
            g = gradient(loss, student)
            assert g[0].isnan().all(), first
            assert not g[2].any(), first


def test_a_row_of_nothing_is_nan(backend: str) -> None:
    student, teacher = torch.randn(2, V), torch.randn(2, V)
    student[0] = -torch.inf
    options = CUDOptions(reduction="none", backend=backend)
    assert cud_loss(student, teacher, None, options).isnan().tolist() == [True, False]
    assert dus_loss(student, torch.tensor([1, 1]), DUSOptions(reduction="none", backend=backend)).isnan()[0]


def test_finfo_min_as_a_mask(backend: str) -> None:
    """The other common mask: the most negative finite number, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student, teacher = torch.randn(4, V).to(dtype), torch.randn(4, V).to(dtype)
        lowest = torch.finfo(dtype).min
        masked_s, masked_t = student.clone(), teacher.clone()
        masked_s[:, 7], masked_t[:, 7] = lowest, lowest
        inf_s, inf_t = student.clone(), teacher.clone()
        inf_s[:, 7], inf_t[:, 7] = -torch.inf, -torch.inf
        labels = torch.tensor([1, 2, 3, -1])
        options = CUDOptions(backend=backend)
        torch.testing.assert_close(
            cud_loss(masked_s, masked_t, labels, options), cud_loss(inf_s, inf_t, labels, options), rtol=1e-6, atol=1e-6
        )


def test_statistics(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    student[3, 20] = 50.0
    for tau in (2.0, 3.0):
        loss, stats = cud_loss(
            student, teacher, labels, CUDOptions(temperature=tau, backend=backend), return_stats=True
        )
        assert torch.equal(loss, cud_loss(student, teacher, labels, CUDOptions(temperature=tau, backend=backend)))
        counts, labelled = labels != -100, labels >= 0
        p, index = teacher.softmax(-1), labels.clamp(min=0)[:, None]
        q = calibrated(teacher, torch.where(labelled, labels, -1), 0.5, 0.7)
        p_y, q_y = p.gather(-1, index)[:, 0], q.gather(-1, index)[:, 0]

        def check(got: torch.Tensor, expected: torch.Tensor, where: torch.Tensor) -> None:
            torch.testing.assert_close(got[where], expected[where])
            assert got[~where].isnan().all()

        assert stats.teacher_top1.tolist() == torch.where(counts, p.argmax(-1), -1).tolist()
        check(stats.teacher_confidence, p.amax(-1), counts)
        check(stats.moved_mass, q_y - p_y, counts)
        check(stats.label_prob, p_y, labelled)
        check(stats.label_prob_calibrated, q_y, labelled)
        check(stats.student_nll, F.cross_entropy(student, labels.clamp(min=0), reduction="none"), labelled)
        check(stats.student_confidence, student.softmax(-1).amax(-1), counts)
        assert stats.student_correct.tolist() == (labelled & (student.argmax(-1) == labels)).tolist()


def test_statistics_of_plain_cross_entropy(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    plain = CUDOptions(kd_weight=0, ce_weight=1, calibration=None, backend=backend)
    loss, stats = cud_loss(student, teacher, labels, plain, return_stats=True)
    torch.testing.assert_close(loss, F.cross_entropy(student, torch.where(labels < 0, -100, labels)))
    assert stats.moved_mass[labels != -100].eq(0).all()


@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_a_teacher_read_for_statistics_only_does_not_touch_the_gradient(backend: str, temperature: float) -> None:
    """Not even where it gives mass to no class, or none to the label."""
    student, teacher, labels = torch.randn(3, V, requires_grad=True), torch.randn(3, V), torch.tensor([0, 1, 2])
    teacher[1], teacher[2, 2] = -torch.inf, -torch.inf
    for save in ("gradient", "state"):
        plain = CUDOptions(temperature=temperature, kd_weight=0, ce_weight=1, save=save, backend=backend)
        loss, _ = cud_loss(student, teacher, labels, plain, return_stats=True)
        expected = F.cross_entropy(student, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(loss, student), gradient(expected, student))


def test_teacher_statistics(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    logits, _, labels = batch
    labels = torch.where(labels == -1, 2, labels)
    _, stats = dus_loss(logits, labels, DUSOptions(backend=backend), return_stats=True)
    p, counted = logits.softmax(-1), labels >= 0
    torch.testing.assert_close(stats.entropy[counted], -(p * p.log()).sum(-1)[counted])
    torch.testing.assert_close(stats.label_prob[counted], p.gather(-1, labels.clamp(min=0)[:, None])[counted, 0])
    torch.testing.assert_close(stats.confidence[counted], p.amax(-1)[counted])
    assert stats.correct.tolist() == (counted & (logits.argmax(-1) == labels)).tolist()
    assert stats.entropy[~counted].isnan().all()


def test_shift_invariance_and_rows_that_sum_to_zero(backend: str, batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    options = CUDOptions(backend=backend)
    a = cud_loss(student, teacher, labels, options)
    b = cud_loss(student + 5, teacher - 70, labels, options)
    torch.testing.assert_close(a, b)
    leaf = student.requires_grad_()
    g = gradient(cud_loss(leaf, teacher, labels, options), leaf)
    assert g.sum(-1).abs().max() < 1e-14


def test_modules(batch: tuple[torch.Tensor, ...]) -> None:
    student, teacher, labels = batch
    loss = CUDLoss(4.0, calibration=WClip(0.3, 1.0), reduction="sum")
    assert repr(loss) == "CUDLoss(reduction='sum', temperature=4.0, calibration=WClip(budget=0.3, margin=1.0))"
    assert torch.equal(loss(student, teacher, labels), cud_loss(student, teacher, labels, loss.options))
    alpha = torch.rand(V) + 0.1
    teacher_loss = DUSLoss(alpha=alpha)
    expected = dus_loss(student, labels.abs() % V, teacher_loss.options, alpha=alpha)
    assert torch.equal(teacher_loss(student, labels.abs() % V), expected)
    assert math.isfinite(DUSLoss(alpha=0.25)(student, labels.abs() % V).item())


def test_masks_as_weights(backend: str) -> None:
    student, teacher, labels, _ = small_batch()
    keep = torch.tensor([1, 1, 0, 1, 1, 0])
    expected = CUDLoss(backend=backend)(student, teacher, labels, weight=keep.float())
    for mask in (keep, keep.bool(), keep.to(torch.int32), keep.to(torch.uint8)):
        assert CUDLoss(backend=backend)(student, teacher, labels, weight=mask).equal(expected)
