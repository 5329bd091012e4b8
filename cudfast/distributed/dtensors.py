"""DTensors as arguments: their local parts, and the mesh dimension that shards the classes.

The group of the mesh dimension whose placement shards the last axis is the loss's process group. On all other
dimensions, with Shard of another axis (rows) or Replicate, each rank uses its own rows.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..rows.shard import Shard
from ..rows.tensors import is_dtensor, waited


class Place:
    """Placement of logits (..., V), or of class weights (V, D) with `classes` = 0, on a mesh."""

    def __init__(self, x: Any, name: str, classes: int, shard: Shard | None) -> None:
        self.mesh, self.placements, self._name = x.device_mesh, tuple(x.placements), name
        self.classes = classes % x.dim()
        if shard is not None:
            raise ValueError(f"process_group was given and {name} is a DTensor, which has its own: leave it out")
        for placement in self.placements:
            if type(placement).__name__ not in ("Shard", "Replicate"):
                raise ValueError(
                    f"{name} has placements {self.placements}: expected Shard or Replicate on every dimension of the "
                    "mesh; call .redistribute(...) first"
                )
        self.dims = [i for i, placement in enumerate(self.placements) if placement.is_shard(self.classes)]
        if len(self.dims) > 1:
            raise ValueError(
                f"{name} has placements {self.placements}: expected at most one dimension that shards the classes"
            )

    def shard(self, width: int) -> Shard | None:
        """The group of the classes, `width` of them in all; None if every rank has all classes."""
        if not self.dims:
            return None
        (dim,) = self.dims
        group = self.mesh.get_group(dim)
        if bool((self.mesh.mesh.diff(dim=dim) > 0).all()):
            return Shard.of(group)
        ranks, at = self.mesh.size(dim), self.mesh.get_local_rank(dim)  # the group may have another order
        return Shard.of(group, min(at * -(-width // ranks), width))

    def same(self, x: Any, name: str) -> Any:
        """The local part of another tensor with the same placements; a plain tensor is returned as it is."""
        if not is_dtensor(x):
            return x
        if x.device_mesh != self.mesh or tuple(x.placements) != self.placements:
            raise ValueError(
                f"{name} has placements {tuple(x.placements)} and {self._name} {self.placements}: expected the same on "
                f"one mesh; to move it, call {name}.redistribute({self._name}.device_mesh, {self._name}.placements)"
            )
        return _local(x)

    def rows(self, x: Any) -> Any:
        """The local part of a tensor with one value per row, with the rows' placements; a plain tensor as it is."""
        if not is_dtensor(x):
            return x
        from torch.distributed.tensor import Replicate

        wanted = [Replicate() if p.is_shard(self.classes) else p for p in self.placements]
        return _local(x.redistribute(self.mesh, wanted))


def _local(x: Any) -> Tensor:
    local: Tensor = waited(x.to_local())
    return local


def localized(
    logits: dict[str, Any], rows: tuple[Any, ...], shard: Shard | None
) -> tuple[list[Any], list[Any], Shard | None]:
    """Local logits (the first argument is a DTensor), local per-row values, and the process group of the classes."""
    (name, first), *others = logits.items()
    place = Place(first, name, -1, shard)
    found = [_local(first), *(place.same(x, other) for other, x in others)]
    return found, [place.rows(x) for x in rows], place.shard(first.shape[-1])


def localized_heads(
    hidden: dict[str, Any], weights: dict[str, Any], rows: tuple[Any, ...], shard: Shard | None
) -> tuple[list[Any], list[Any], list[Any], Shard | None, bool]:
    """Local hidden states, class weights and biases (the first weight is a DTensor), and per-row values; the process
    group of the classes, and whether the hidden states are sharded over it."""
    (name, first), *others = weights.items()
    place = Place(first, name, 0, shard)
    if place.mesh.ndim != 1 or not place.dims:
        raise ValueError(
            f"{name} has placements {place.placements} on a mesh of {place.mesh.ndim} dimensions: expected (Shard(0),) "
            "on the mesh dimension of the classes, such as mesh['tp']; if every rank has all of it, pass .to_local()"
        )
    found = [_local(first), *(place.same(x, other) for other, x in others)]
    cut, local = [], []
    for other, x in hidden.items():
        if is_dtensor(x):
            if x.device_mesh != place.mesh or not (x.placements[0].is_replicate() or x.placements[0].is_shard(0)):
                raise ValueError(
                    f"{other} has placements {tuple(x.placements)}: expected Replicate() or Shard(0) on {name}'s mesh"
                )
            cut.append(x.placements[0].is_shard(0))
        elif x is not None:
            cut.append(False)
        local.append(_local(x) if is_dtensor(x) else x)
    if len(set(cut)) > 1:
        raise ValueError(f"{' and '.join(hidden)} have different placements: expected Replicate() for all, or Shard(0)")
    whole = [x.full_tensor() if is_dtensor(x) else x for x in rows]
    return local, found, whole, place.shard(first.shape[0]), cut[0]
