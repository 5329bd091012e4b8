"""DTensors, two-dimensional meshes, DDP and FSDP2."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Cut
from torch.nn.parallel import DistributedDataParallel

from cudfast import CUDLoss, DUSLoss, FusedLinearCUDLoss

from .shards import N, V, batch, case, close, f64, refused


@case
def dtensors() -> None:
    """Placements give the shards; a 2-D mesh's data dimension is not used; gradients have their tensors' placements."""
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

    The last comparison finds a trunk whose gradient is a multiple of the right one although the loss is right.
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
