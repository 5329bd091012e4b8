"""Losses of logits over shards against those of one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cudfast import (
    ClassSets,
    CrossEntropy,
    CUDLoss,
    DUSLoss,
    Entropy,
    Focal,
    ForwardKL,
    Gate,
    Loss,
    Projection,
    WClip,
    ZLoss,
)
from cudfast.distributed.group import HEADER
from cudfast.functional import cud_loss

from .shards import N, Sent, V, agree, batch, case, close, f32, f64, groups, mine, refused

STUDENT: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "reduction": "none"},
    {"temperature": 3.0, "reduction": "sum", "calibration": None},
    {"kd_weight": 1.0, "ce_weight": 0.0, "calibration": WClip(0.9, 1.0)},
    {"save": "gradient", "ignore_index": 0, "unlabeled_index": 7},
    {"backend": "reference", "temperature": 4.0},
]
TEACHER: list[dict[str, Any]] = [
    {},
    {"gamma": 2.0, "differentiate_gate": True, "reduction": "none"},
    {"focal_weight": 0.0, "entropy_weight": 0.0, "reduction": "sum", "backend": "reference"},
]


@case
def student_loss() -> None:
    for group, widths in groups():
        for dtype in (f32, f64):
            *logits, labels = batch(dtype)
            for options in STUDENT if dtype is f64 else STUDENT[:2]:
                agree(group, widths, CUDLoss, options, tuple(logits), labels % V if "save" in options else labels)


@case
def teacher_loss() -> None:
    for group, widths in groups():
        for dtype in (f32, f64):
            logits, _, labels = batch(dtype)
            labels[2] = 3
            for options in TEACHER if dtype is f64 else TEACHER[:2]:
                agree(group, widths, DUSLoss, options, (logits,), labels)
            agree(group, widths, DUSLoss, {"alpha": torch.rand(V) + 0.5}, (logits,), labels)


@case
def sums_of_terms() -> None:
    """With and without a teacher, with weights of terms and a scale per class."""
    every = 0.8 * ForwardKL() + 0.2 * CrossEntropy() - 0.1 * Entropy() + 1e-3 * ZLoss() + 0.3 * Focal(2.0)
    for group, widths in groups():
        for dtype in (f32, f64):
            s, t, labels = batch(dtype)
            call: dict[str, Any] = {"term_weights": {"forward_kl": torch.rand(N), "entropy": 0.5}}
            agree(group, widths, Loss, {"terms": every, "calibration": WClip()}, (s, t), labels, **call)
            agree(group, widths, Loss, {"terms": ForwardKL(3.0) + ZLoss(), "reduction": "none"}, (s, t), None)
            labelled = labels.clamp(min=0)
            alpha = torch.linspace(0.5, 1.5, V)
            own = {"terms": CrossEntropy() + Focal(2.0, alpha) - 0.1 * Entropy(Gate())}
            agree(group, widths, Loss, own, (s,), None, labelled)
    near = ClassSets.from_groups(torch.arange(V) % 7)
    projection = Projection(near=near, min_near_mass=0.3, min_entropy=0.5)
    terms = {"terms": ForwardKL() - 0.1 * Entropy(), "calibration": projection}
    for group, widths in groups():
        s, t, labels = batch(f64)
        agree(group, widths, Loss, terms, (s, t), labels)


@case
def everything_of_a_call() -> None:
    """Weights (some 0), a temperature per row, num_items, no labels, leading shapes, mixed dtypes."""
    for group, widths in groups():
        s, t, labels = batch(f64)
        weight, tau = torch.rand(N), torch.rand(N) * 3 + 0.5
        weight[6] = 0
        agree(group, widths, CUDLoss, {}, (s, t), labels, weight=weight, temperature=tau, num_items=5)
        agree(group, widths, CUDLoss, {}, (s, t), None)
        agree(
            group,
            widths,
            CUDLoss,
            {"reduction": "none"},
            (s[:10].view(2, 5, V), t[:10].view(2, 5, V)),
            labels[:10].view(2, 5),
        )
        agree(group, widths, CUDLoss, {}, (s.bfloat16(), t.float()), labels)
        agree(group, widths, DUSLoss, {}, (s,), labels.clamp(min=0), weight=weight, num_items=torch.tensor(3.0))


@case
def exact_projection() -> None:
    """Active, inactive and infeasible bounds on masses and on the entropy; sets over ranks."""
    near = ClassSets.from_groups(torch.arange(V) % 7)
    far = ClassSets.from_lists([[(y + 1) % V, (y + 50) % V] for y in range(V)], include_label=False)
    asked: list[tuple[dict[str, Any], str]] = [
        ({"min_near_mass": 0.3, "max_wrong_mass": 0.05}, "native"),
        ({"near": near, "wrong": far, "min_near_mass": 0.6, "max_wrong_mass": 0.01}, "native"),
        ({"near": near, "max_wrong_mass": 0.0, "min_entropy": 2.5}, "reference"),
        ({"min_near_mass": torch.linspace(0, 1, N), "max_entropy": 0.8, "on_infeasible": "relax"}, "reference"),
    ]
    for group, widths in list(groups())[2::2]:
        for dtype in (f32, f64) if widths[0] else (f64,):
            s, t, labels = batch(dtype)
            labels[4] = 30
            for bounds, backend in asked:
                options = {"calibration": Projection(**bounds), "backend": backend, "reduction": "none"}
                agree(group, widths, CUDLoss, options, (s, t), labels)
    s, t, labels = batch(f64)
    group, widths = list(groups())[-1]
    part = [mine(x, group, widths) for x in (s, t)]
    loss = CUDLoss(calibration=Projection(min_near_mass=0.5), process_group=group)
    refused(ValueError, "row 4 cannot meet min_near_mass=0.5", of=lambda: loss(*part, labels))


@case
def cross_entropy_alone() -> None:
    for group, widths in groups():
        s, _, labels = batch(f64)
        whole = s.clone().requires_grad_()
        part = mine(s, group, widths).clone().requires_grad_()
        wanted = CUDLoss(kd_weight=0, ce_weight=1.0)(whole, None, labels)
        got = CUDLoss(kd_weight=0, ce_weight=1.0, process_group=group)(part, None, labels)
        close(got, wanted, widths)
        (grad,), (wanted_grad,) = torch.autograd.grad(got, part), torch.autograd.grad(wanted, whole)
        close(grad, mine(wanted_grad, group, widths), widths)


@case
def rows_that_are_nan_or_none() -> None:
    """A NaN in one rank's classes is a NaN row in every rank; no rows at all."""
    for group, widths in groups():
        s, t, labels = batch(f64)
        s[7, 90], t[8, 3], t[9, 40], s[10] = torch.nan, torch.nan, torch.inf, -torch.inf
        agree(group, widths, CUDLoss, {"reduction": "none"}, (s, t), labels)
        agree(group, widths, CUDLoss, {}, (s[:0], t[:0]), labels[:0])


@case
def given_offsets_and_padding() -> None:
    """Ranks whose classes are not in their order; the last classes are padding."""
    for group, widths in groups():
        s, t, labels = batch(f64)
        rank, last = dist.get_rank(group), len(widths) - 1
        turned = widths[::-1]
        first = sum(turned[: last - rank])
        part = slice(first, first + turned[last - rank])
        x = s[:, part].clone().requires_grad_()
        whole = s.clone().requires_grad_()
        labels = labels.clamp(max=70)
        loss = CUDLoss(process_group=group, class_offset=first, num_classes=71)(x, t[:, part], labels)
        wanted = CUDLoss(num_classes=71)(whole, t, labels)
        close(loss, wanted, widths)
        close(torch.autograd.grad(loss, x)[0], torch.autograd.grad(wanted, whole)[0][:, part], widths)


@case
def inplace_grad_out_and_twice() -> None:
    for group, widths in groups():
        s, t, labels = batch(f64)
        whole = s.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(CUDLoss()(whole, t, labels), whole)
        wanted = mine(wanted, group, widths)
        part, teacher = mine(s, group, widths).clone().requires_grad_(), mine(t, group, widths)
        logits = part * 1
        CUDLoss(process_group=group, inplace=True)(logits, teacher, labels).backward()
        close(part.grad, wanted, "inplace")
        close(logits.detach(), wanted, "inplace")
        out = torch.empty_like(part)
        shard = CUDLoss(process_group=group).shard
        loss = cud_loss(part, teacher, labels, grad_out=out, shard=shard)
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss, part, retain_graph=True)
            close(grad, wanted, "grad_out")
        with torch.no_grad():
            cud_loss(part, teacher, labels, grad_out=out.zero_(), shard=shard)
        close(out, wanted, "no_grad")


@case
def what_is_sent() -> None:
    """A header and one row state forward, nothing of size V, nothing backward."""
    group, rows = dist.group.WORLD, 64
    for dtype, per_row in ((f32, (52, 16)), (f64, (96, 32))):
        for classes in (8, 800):
            s, t = torch.randn(2, rows, classes, dtype=dtype)
            s.requires_grad_()
            labels = torch.randint(4 * classes, (rows,))
            dist.broadcast(labels, 0)
            for loss, logits, wanted in ((CUDLoss, (s, t), per_row[0]), (DUSLoss, (s,), per_row[1])):
                with Sent() as sent:
                    value = loss(process_group=group)(*logits, labels)
                assert sent.names == ["allgather", "allgather"]
                assert sent.bytes == [HEADER, rows * wanted]
                assert wanted <= 96
                with Sent() as sent:
                    value.backward()
                assert sent.bytes == []
            bounds = {"min_near_mass": 0.3, "max_wrong_mass": 0.05}
            for entropy in ({}, {"min_entropy": 1.0}):
                with Sent() as sent:
                    value = CUDLoss(calibration=Projection(**bounds, **entropy), process_group=group)(s, t, labels)
                if not entropy:
                    assert sum(sent.bytes) - HEADER == rows * {f32: 96, f64: 160}[dtype]
                assert max(sent.bytes[1:]) <= 96 * rows
                with Sent() as sent:
                    value.backward()
                assert sent.bytes == []


@case
def compiled() -> None:
    """fullgraph, eager's numbers, also if ranks differ in width and backward runs after another call."""
    for group, widths in list(groups())[4:6]:  # uneven; ranks without a class
        s, t, labels = batch(f32)
        part, teacher = mine(s, group, widths).clone().requires_grad_(), mine(t, group, widths)
        loss = CUDLoss(process_group=group)
        torch._dynamo.reset()
        values = []
        for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            value, other = f(part.tanh(), teacher, labels), f(part * 2, teacher, labels)
            values.append((value, *torch.autograd.grad(value + 3 * other, part)))
        for got, wanted in zip(*values):
            close(got, wanted, widths)
