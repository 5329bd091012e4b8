"""What tests/test_sharded.py runs in every one of four processes: losses over shards against those of one process."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from cudfast import ClassSets, CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss, Projection, WClip
from cudfast.distributed import reshard
from cudfast.distributed.group import HEADER
from cudfast.functional import cud_loss
from examples import class_parallel

from .ranks import PATIENCE, run_cases, start

N, V = 11, 96
f32, f64 = torch.float32, torch.float64
TOLERANCE = {f32: 1e-6, f64: 1e-12}
CASES: dict[str, Callable[[], None]] = {}


def case(f: Callable[[], None]) -> Callable[[], None]:
    CASES[f.__name__] = f
    return f


def main(rank: int, ranks: int, folder: Path) -> None:
    start(rank, ranks, folder)
    run_cases(rank, ranks, folder, CASES, last=rank_dies)


_GROUPS: list[Any] = []


def groups() -> Iterator[tuple[Any, list[int]]]:
    """This process's group of two and that of all four, each with cuts that are even, uneven, and with empty shards."""
    if not _GROUPS:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        _GROUPS.extend([pairs[dist.get_rank() // 2], dist.group.WORLD])
    for widths in ([48, 48], [95, 1], [0, 96]):
        yield _GROUPS[0], widths
    for widths in ([24, 24, 24, 24], [1, 50, 13, 32], [0, 60, 0, 36], [0, 0, 0, 96]):
        yield _GROUPS[1], widths


def mine(x: Tensor, group: Any, widths: list[int]) -> Tensor:
    """This rank's columns."""
    rank = dist.get_rank(group)
    first = sum(widths[:rank])
    return x[..., first : first + widths[rank]]


def batch(dtype: torch.dtype, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, labels: labels and top-1 everywhere, ties of the top-1 in far classes, classes that cannot
    happen, rows without a label, rows that are ignored."""
    s, t = torch.randn(2, rows, V, dtype=f64) * 3
    labels = torch.randint(V, (rows,))
    labels[:4] = torch.tensor([0, V - 1, -1, -100])
    t[:3, [5, 50, V - 1]] = 11.0  # ties: the first of them is the top-1, wherever the others live
    t[4, 70:] = -torch.inf
    s[5, :30] = t[5, :30] = -torch.inf
    labels[4], labels[5] = 80, 40  # a label without mass
    return s.to(dtype), t.to(dtype), labels


def close(got: Tensor, wanted: Tensor, what: object) -> None:
    assert got.shape == wanted.shape, what
    assert got.dtype == wanted.dtype, what
    error = (got - wanted).abs() / wanted.abs().clamp(min=1)
    error = torch.where(got.isnan() & wanted.isnan() | (got == wanted), 0, error)
    tolerance = TOLERANCE.get(got.dtype, 1e-2)
    assert bool((error <= tolerance).all()), f"{what}: {float(error.max()):.1e}"


def agree(
    group: Any,
    widths: list[int],
    loss: type,
    options: dict[str, Any],
    logits: tuple[Tensor, ...],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Loss, gradient and statistics of shards are those of one process, whatever the upstream gradient."""
    what = (loss.__name__, widths, options, list(kwargs))
    whole = [logits[0].clone().requires_grad_(), *logits[1:]]
    wanted, wanted_stats = loss(**options)(*whole, *args, **kwargs, return_stats=True)
    upstream = torch.rand_like(wanted) + 0.5
    (wanted_grad,) = torch.autograd.grad(wanted, whole[0], upstream)
    parts = [mine(x, group, widths).clone() for x in logits]
    parts[0].requires_grad_()
    got, stats = loss(**options, process_group=group)(*parts, *args, **kwargs, return_stats=True)
    (grad,) = torch.autograd.grad(got, parts[0], upstream)
    close(got, wanted, what)
    close(grad, mine(wanted_grad, group, widths), what)
    for name, a, b in zip(stats._fields, stats, wanted_stats):
        close(a, b, (name, *what)) if a.is_floating_point() else torch.testing.assert_close(a, b, msg=f"{name} {what}")


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
    """Bounds on masses and on the entropy, that bind, that do not and that are out of reach; sets over ranks."""
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
    part = [mine(x, *last) for x in (s, t)] if (last := list(groups())[-1]) else []
    loss = CUDLoss(calibration=Projection(min_near_mass=0.5), process_group=last[0])
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
        close(
            *(torch.autograd.grad(x, y)[0] for x, y in ((got, part),)),
            mine(torch.autograd.grad(wanted, whole)[0], group, widths),
            widths,
        )


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


def rows_of(x: Tensor, group: Any, sizes: list[int]) -> Tensor:
    rank = dist.get_rank(group)
    return x[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


@case
def fused_linear_heads() -> None:
    """Heads whose classes are spread over ranks: hidden states whole or cut; their gradient is summed once."""
    for group, widths in groups():
        rank, ranks = dist.get_rank(group), len(widths)
        sizes = [N - ranks + 1] + [1] * (ranks - 1)
        for options in (
            {"memory_budget": 1 << 20},
            {"reduction": "none", "student_logit_softcap": 5.0},
            {"save": "state"},
        ):
            _, _, labels = batch(f64)
            leaves = [torch.randn(*shape, dtype=f64) for shape in ((N, 5), (V, 5), (V,))]
            teacher = [torch.randn(*shape, dtype=f64) for shape in ((N, 7), (V, 7), (V,))]
            whole = [x.clone().requires_grad_() for x in leaves]
            names = ("teacher_hidden", "teacher_weight", "teacher_bias")
            wanted, wanted_stats = FusedLinearCUDLoss(**options)(
                *whole[:2], labels, student_bias=whole[2], **dict(zip(names, teacher)), return_stats=True
            )
            upstream = torch.rand_like(wanted) + 0.5
            wanted_grads = torch.autograd.grad(wanted, whole, upstream)
            for cut in (False, True):
                hidden, th = (rows_of(x, group, sizes) if cut else x for x in (leaves[0], teacher[0]))
                mine_ = [hidden.clone().requires_grad_()]
                mine_ += [mine(x.t(), group, widths).t().clone().requires_grad_() for x in leaves[1:]]
                parts = (th, *(mine(x.t(), group, widths).t().contiguous() for x in teacher[1:]))
                loss = FusedLinearCUDLoss(**options, process_group=group, sequence_sharded=cut)
                got, stats = loss(
                    *mine_[:2], labels, student_bias=mine_[2], **dict(zip(names, parts)), return_stats=True
                )
                close(got, wanted, (widths, options, cut))
                grads = torch.autograd.grad(got, mine_, upstream)
                expected = rows_of(wanted_grads[0], group, sizes) if cut else wanted_grads[0]
                close(grads[0], expected, ("hidden", widths, options, cut))
                for grad, of in zip(grads[1:], wanted_grads[1:]):
                    close(grad, mine(of.t(), group, widths).t(), ("weight or bias", widths, options, cut))
                close(stats.student_nll, wanted_stats.student_nll, "statistics")
        assert rank < ranks


class Sent(TorchDispatchMode):
    """Bytes that this rank hands to collectives, and their names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[-1].rstrip("_")
            given = args[1] if name == "allgather" else args[0]
            self.names.append(name)
            self.bytes.append(sum(x.nbytes for x in given))
        return func(*args, **(kwargs or {}))


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
def fused_linear_teacher_and_what_it_sends() -> None:
    """DUSLoss from hidden states; no rows that count; bytes: states forward, the hidden states' gradient backward."""
    for group, widths in groups():
        h, w = torch.randn(N, 5, dtype=f64), torch.randn(V, 5, dtype=f64)
        labels, alpha = torch.randint(V, (N,)), torch.rand(V) + 0.5
        labels[2] = -100
        for y in (labels, torch.full_like(labels, -100)):
            whole, part = (x.clone().requires_grad_() for x in (w, mine(w.t(), group, widths).t()))
            hidden = h.clone().requires_grad_()
            wanted = FusedLinearDUSLoss(alpha=alpha, logit_scale=0.5)(h, whole, y)
            with Sent() as sent:
                got = FusedLinearDUSLoss(alpha=alpha, logit_scale=0.5, process_group=group)(hidden, part, y)
            close(got, wanted, widths)
            assert sum(sent.bytes) == HEADER + int((y >= 0).sum()) * 32
            with Sent() as sent:
                got.backward()
            assert sent.bytes == [hidden.nbytes]
            wanted.backward()
            close(part.grad, mine(whole.grad.t(), group, widths).t(), widths)


@case
def dtensors() -> None:
    """Placements are understood; a 2-D mesh's data dimension is left alone; gradients lie as their tensors."""
    flat, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    turned = DeviceMesh("cpu", torch.tensor([3, 1, 0, 2]))
    s, t, labels = batch(f64, 12)
    whole = s.clone().requires_grad_()
    wanted = CUDLoss(reduction="none")(whole, t, labels)
    (grad,) = torch.autograd.grad(wanted.sum(), whole)
    for mesh, places, rows in (
        (flat, [Cut(-1)], [Replicate()]),
        (turned, [Cut(1)], [Replicate()]),
        (flat, [Cut(0)], [Cut(0)]),
        (flat, [Replicate()], [Replicate()]),
        (square, [Cut(0), Cut(1)], [Cut(0), Replicate()]),
        (square, [Replicate(), Cut(1)], [Replicate(), Replicate()]),
    ):
        x, teacher = (distribute_tensor(y, mesh, places) for y in (s.clone(), t))
        x.requires_grad_()
        y = distribute_tensor(labels, mesh, [Replicate()] * mesh.ndim)
        value = CUDLoss(reduction="none")(x, teacher, y)
        close(value, distribute_tensor(wanted.detach(), mesh, rows).to_local(), places)
        value.sum().backward()
        close(x.grad.full_tensor(), grad, places)
        moved = distribute_tensor(t, mesh, [Replicate() if p.is_shard() else Cut(0) for p in places])
        refused(ValueError, "teacher_logits.redistribute", of=functools.partial(CUDLoss(), x, moved, y))
    dus = DUSLoss()(distribute_tensor(s, flat, [Cut(1)]), labels.clamp(min=0))
    close(dus, DUSLoss()(s, labels.clamp(min=0)), "DUSLoss")


@case
def dtensor_heads() -> None:
    mesh = init_device_mesh("cpu", (4,))
    h, w, b = (torch.randn(*shape, dtype=f64) for shape in ((10, 5), (V, 5), (V,)))
    th, tw = torch.randn(10, 7, dtype=f64), torch.randn(V, 7, dtype=f64)
    labels = torch.randint(V, (10,))
    whole = [x.clone().requires_grad_() for x in (h, w, b)]
    wanted = FusedLinearCUDLoss()(*whole[:2], labels, student_bias=whole[2], teacher_hidden=th, teacher_weight=tw)
    wanted.backward()
    for place in (Replicate(), Cut(0)):
        parts = [
            distribute_tensor(x.clone(), mesh, [p]).requires_grad_() for x, p in zip((h, w, b), (place, Cut(0), Cut(0)))
        ]
        teacher = {
            "teacher_hidden": distribute_tensor(th, mesh, [place]),
            "teacher_weight": distribute_tensor(tw, mesh, [Cut(0)]),
        }
        got = FusedLinearCUDLoss()(*parts[:2], labels, student_bias=parts[2], **teacher)
        close(got, wanted, place)
        got.backward()
        for part, of in zip(parts, whole):
            close(part.grad.full_tensor(), of.grad, place)


class Model(nn.Module):
    """A trunk, some of the classes of a head, and the loss of both."""

    def __init__(self, head: Tensor, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Linear(6, 5, dtype=f64)
        self.head, self.loss = nn.Parameter(head.clone()), loss

    def forward(self, x: Tensor, labels: Tensor, teacher: Tensor, items: float) -> Tensor:
        h = self.trunk(x).tanh()
        if isinstance(self.loss, FusedLinearCUDLoss):
            return self.loss(h, self.head, labels, teacher_logits=teacher, num_items=items)
        return self.loss(h @ self.head.t(), teacher, labels, num_items=items)


@case
def data_parallel() -> None:
    """DDP and FSDP2 average over data ranks: with num_items = the rows of all of them / their number, parameters get
    the gradients of one process, however rows are split, with classes whole or over the other dimension of the mesh.

    The trap is in the last comparison: a trunk whose gradient is a multiple of what it should be, the loss being right.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x, w, t = torch.randn(N, 6, dtype=f64), torch.randn(V, 5, dtype=f64), torch.randn(N, V, dtype=f64)
    labels = torch.randint(V, (N,))
    labels[:2] = torch.tensor([-1, -100])
    one = Model(w, CUDLoss())
    wanted = one(x, labels, t, N - 1)
    wanted.backward()
    for spread in (False, True):
        for wrap in (DistributedDataParallel, fully_shard):
            for split in (2, 8):
                data = mesh["dp"] if spread else init_device_mesh("cpu", (4,))
                ranks, rank = data.size(), data.get_local_rank()
                rows = torch.arange(N).tensor_split([split] if spread else [split, split, 9])[rank]
                classes = slice(0, 30) if mesh.get_local_rank("tp") == 0 else slice(30, V)
                group = mesh.get_group("tp")
                loss: nn.Module = FusedLinearCUDLoss(process_group=group) if spread else CUDLoss()
                head, teacher = (w[classes], t[:, classes]) if spread else (w, t)
                model: Any = Model(head, loss)
                if wrap is fully_shard:
                    fully_shard(model, mesh=data)
                else:
                    model = DistributedDataParallel(model, process_group=data.get_group())
                value = model(x[rows], labels[rows], teacher[rows], (N - 1) / ranks)
                value.backward()
                mean = value.detach().clone()
                dist.all_reduce(mean, group=data.get_group())
                close(mean / ranks, wanted.detach(), (wrap.__name__, spread, split))
                for name, p in model.named_parameters():
                    grad = p.grad.full_tensor() if wrap is fully_shard else p.grad
                    expected = one.get_parameter(name.removeprefix("module.")).grad
                    if spread and name.endswith("head"):
                        expected = expected[classes]
                    close(grad, expected, (name, wrap.__name__, spread, split))


@case
def teachers_that_are_cut_elsewhere() -> None:
    """Refused, unless they are moved; a teacher with fewer or more padded classes than the student."""
    everyone, last = dist.group.WORLD, dist.get_rank() == 3
    error = ValueError if last else RuntimeError
    refused(error, "width=-1", of=lambda: reshard(torch.ones(2, 3), -1 if last else 4, everyone))
    refused(TypeError, "process_group is None", of=lambda: reshard(torch.ones(2, 3), 3, None))
    for group, widths in groups():
        s, t, labels = batch(f64)
        there = widths[::-1] if widths[0] != widths[-1] else [V - len(widths) + 1] + [1] * (len(widths) - 1)
        part, elsewhere = mine(s, group, widths), mine(t, group, there)
        loss = CUDLoss(process_group=group)
        refused(
            (ValueError, RuntimeError), "cut at the same classes", of=functools.partial(loss, part, elsewhere, labels)
        )
        moved = reshard(elsewhere, part.shape[-1], group)
        assert torch.equal(moved, mine(t, group, widths))
        for short in (t[:, :90], torch.cat([t, t], -1)):
            whole = torch.cat([short, torch.full_like(t, -torch.inf)], -1)[:, :V]
            there = [short.shape[-1] - 3 * (len(widths) - 1)] + [3] * (len(widths) - 1)
            moved = reshard(mine(short, group, there), part.shape[-1], group)
            assert torch.equal(moved, mine(whole, group, widths))


@case
def example() -> None:
    losses = [value for value, _ in class_parallel.train(5000, 8, 16, torch.device("cpu"))]
    assert losses[-1] < losses[0] / 2
    said: list[Any] = [None] * 4
    dist.all_gather_object(said, losses)
    assert said == [losses] * 4


@case
def compiled() -> None:
    """fullgraph, eager's numbers, also where ranks differ in width and backward comes after another call."""
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


def refused(error: type | tuple[type, ...], *words: str, of: Callable[[], object]) -> None:
    try:
        of()
    except Exception as found:
        if isinstance(found, error) and all(word in str(found) for word in words):
            return
        raise AssertionError(f"expected {error} with {words}") from found
    raise AssertionError(f"nothing was raised: expected {words}")


@case
def ranks_that_do_not_go_together() -> None:
    """All ranks end with an error that names one that differs, and the group can be used again."""
    rank, group = dist.get_rank(), dist.group.WORLD
    s, t, labels = batch(f32)
    s, t, inside = s[:, :8], t[:, :8], labels % 32
    odd = inside.clone()
    odd[5] += 1

    def call(rows: int = N, labels: Any = inside, **options: Any) -> Tensor:
        return CUDLoss(process_group=group, **options)(s[:rows], t[:rows], labels[:rows])

    same = "expected the same on every rank"
    refused(ValueError, "rank 2 ", "leading shape = [7]", "rank 0 [11]", same, of=lambda: call(7 if rank == 2 else N))
    refused(ValueError, "rank 3 ", "kd_weight = 0.5", "0.8", same, of=lambda: call(kd_weight=0.5 if rank == 3 else 0.8))
    refused(ValueError, "rank 1 ", "temperature", same, of=lambda: call(temperature=3.0 if rank == 1 else 2.0))
    refused(ValueError, "rank 1 ", "labels", "crc32", of=lambda: call(labels=odd if rank == 1 else inside))
    refused(ValueError, "labels[1] = 95: expected a class in [0, 32)", of=lambda: call(labels=labels))
    refused(
        ValueError,
        "rank 2 gave class_offset=17",
        "[8, 16)",
        "expected class_offset=16",
        of=lambda: call(class_offset=8 * rank + (rank > 1)),
    )
    refused(
        ValueError, "rank 0 gave class_offset=0, and rank 1 none", of=lambda: call(class_offset=None if rank else 0)
    )
    error = ValueError if rank == 1 else RuntimeError
    words = ("9 classes on this rank",) if rank == 1 else ("rank 1 refused its arguments", "9 classes on this rank")
    wide = torch.randn(N, 9)
    refused(error, *words, of=lambda: CUDLoss(process_group=group)(wide if rank == 1 else s, t, labels))
    refused(ValueError, "no rank", of=lambda: CUDLoss(process_group=group)(s[:, :0], t[:, :0], labels))
    refused(
        ValueError,
        "32 classes in all",
        "for 9",
        of=lambda: DUSLoss(alpha=torch.ones(9), process_group=group)(s, labels.abs() % 9),
    )
    pair = next(iter(groups()))[0]
    if rank > 1:
        words = ("rank 1 of the group (rank 3 of all)", "leading shape")
        refused(ValueError, *words, of=lambda: DUSLoss(process_group=pair)(s[rank:], labels[rank:] % 16))
    agree(group, [24] * 4, CUDLoss, {}, batch(f32)[:2], labels)


@case
def heads_that_do_not_go_together() -> None:
    """What one rank refuses, or wants no gradient of, leaves no other waiting; DTensors beside plain tensors."""
    rank, group = dist.get_rank(), dist.group.WORLD
    h, w, labels = torch.randn(N, 5), torch.randn(24, 5, requires_grad=True), torch.arange(N)

    def call(hidden: Tensor = h, labels: Any = labels, **options: Any) -> Tensor:
        return FusedLinearDUSLoss(process_group=group, **options)(hidden, w, labels)

    error = TypeError if rank == 1 else RuntimeError
    refused(error, "labels is None", of=lambda: call(labels=None if rank == 1 else labels))
    error = ValueError if rank == 1 else RuntimeError
    refused(error, "memory_budget=100 bytes", of=lambda: call(memory_budget=100 if rank == 1 else 1 << 20))
    wanted = h.clone().requires_grad_(rank != 1)
    refused(ValueError, "rank 1 was given gradient of the hidden states = False", of=lambda: call(wanted))
    mesh = init_device_mesh("cpu", (4,))
    s, t = h[:, :4], distribute_tensor(h, mesh, [Cut(1)])
    refused(TypeError, "teacher_logits is a DTensor", of=lambda: CUDLoss()(h, t, labels % 5))
    labels_ = distribute_tensor(labels, mesh, [Cut(0)])
    refused(TypeError, "labels is a DTensor", of=lambda: DUSLoss(process_group=group)(s, labels_))
    items = (labels_ >= 0).sum()
    refused(TypeError, "num_items is a DTensor", of=lambda: DUSLoss()(t, labels_ % 5, num_items=items))
    refused(TypeError, "hidden is a DTensor", of=lambda: call(distribute_tensor(h, mesh, [Cut(0)])))
    assert bool(call().isfinite())


def rank_dies() -> None:
    """The others end with its name. The last case: the group is of no use afterwards."""
    s, t, labels = batch(f32)
    if dist.get_rank() == 2:
        os._exit(0)
    begin = time.monotonic()
    refused(
        RuntimeError, "rank 2", "cannot be reached", of=lambda: CUDLoss(process_group=dist.group.WORLD)(s, t, labels)
    )
    assert time.monotonic() - begin < PATIENCE
