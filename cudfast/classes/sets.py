"""One set of classes for every class: its near classes, or its wrong classes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .arrays import as_integers, as_tensor, at_least_one, first, largest_in, progress, refuse_cycles, slices
from .files import load, save

_LIMIT = 2**31  # largest number of members that a derived constructor makes: 16 GiB of indices
_BLOCK_BYTES = 2**23  # of scores at a time, so that they and their temporaries need less than 64 MB
_METADATA = {"format": "cudfast.ClassSets", "version": "1"}


@dataclass(frozen=True, eq=False, repr=False)
class ClassSets:
    """A set of classes for every class y of V, stored by rows: the set of y is indices[offsets[y]:offsets[y + 1]].

    Both tensors are dense and on one device. Do not write to them.

    Args:
        offsets: int64 (V + 1,), from 0 to the number of members, non-decreasing.
        indices: int64 (members,), classes in [0, V), ascending and unique within each set.

    Raises:
        TypeError, ValueError: invalid tensors; the error names the first invalid element.

    Example:
        >>> sets = ClassSets.from_groups([0, 0, 1])
        >>> sets
        ClassSets(num_classes=3, members=5)
        >>> sets.row(1)
        tensor([0, 1])
    """

    offsets: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        for name in ("offsets", "indices"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
            if value.dtype != torch.int64:
                raise TypeError(f"{name} has dtype {value.dtype}: expected int64; call .long() first")
            if value.dim() != 1 or not value.is_contiguous():
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and strides {value.stride()}: expected one dense axis"
                )
        offsets, indices = self.offsets, self.indices
        if offsets.device != indices.device:
            raise ValueError(f"offsets is on {offsets.device} and indices on {indices.device}: move them to one device")
        if len(offsets) < 2:
            raise ValueError(f"offsets has shape {tuple(offsets.shape)}: expected (V + 1,) with at least one class")
        if offsets[0] != 0 or offsets[-1] != len(indices):
            raise ValueError(
                f"offsets runs from {offsets[0]} to {offsets[-1]}: expected 0 to {len(indices)}, the length of indices"
            )
        if (y := first(offsets[1:] < offsets[:-1])) is not None:
            raise ValueError(f"offsets falls from {offsets[y]} to {offsets[y + 1]} at class {y}: expected it to rise")
        if (i := first((indices < 0) | (indices >= len(self)))) is not None:
            raise ValueError(
                f"the set of class {self._owner(i)} holds {indices[i]}: expected a class in [0, {len(self)})"
            )
        falls = indices[1:] <= indices[:-1]
        starts = offsets[1:-1]
        falls[starts[(starts > 0) & (starts < len(indices))] - 1] = False
        if (i := first(falls)) is not None:
            raise ValueError(
                f"the set of class {self._owner(i)} holds {indices[i + 1]} after {indices[i]}: expected ascending and "
                "unique classes; ClassSets.from_lists takes them in any order"
            )

    @classmethod
    def trusted(cls, offsets: Tensor, indices: Tensor) -> ClassSets:
        """Sets from tensors that were checked before."""
        sets = object.__new__(cls)
        object.__setattr__(sets, "offsets", offsets)
        object.__setattr__(sets, "indices", indices)
        return sets

    def __repr__(self) -> str:
        return f"ClassSets(num_classes={len(self)}, members={len(self.indices)})"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_classes(self) -> int:
        """V."""
        return len(self)

    def row(self, y: int) -> Tensor:
        """The set of class y: int64 (members of y,), ascending, a view.

        Raises:
            IndexError: y is not in [0, V).
        """
        if not 0 <= y < len(self):
            raise IndexError(f"row({y}): expected a class in [0, {len(self)})")
        return self.indices[self.offsets[y] : self.offsets[y + 1]]

    def to(self, device: str | torch.device) -> ClassSets:
        """The same sets on a device; the object itself if it is there already."""
        offsets = self.offsets.to(device)
        return self if offsets is self.offsets else ClassSets.trusted(offsets, self.indices.to(device))

    def contains_label(self) -> Tensor:
        """Whether each class is in its own set: bool (V,).

        Example:
            >>> ClassSets.from_lists([[1], []]).contains_label()
            tensor([True, True])
        """
        found = torch.zeros(len(self), dtype=torch.bool, device=self.offsets.device)
        found[self.indices[self.indices == self._owners()]] = True
        return found

    def overlap(self, other: ClassSets) -> int | None:
        """The first class whose set here and set in `other` share a member, or None.

        Raises:
            ValueError: the two have different numbers of classes or devices.

        Example:
            >>> near = ClassSets.from_lists([[1], [0], []])
            >>> near.overlap(ClassSets.from_lists([[2], [2, 0], [1]], include_label=False))
            1
        """
        if len(other) != len(self):
            raise ValueError(f"the sets have {len(self)} and {len(other)} classes: expected the same number")
        if other.offsets.device != self.offsets.device:
            raise ValueError(
                f"the sets are on {self.offsets.device} and {other.offsets.device}: move them to one device"
            )
        mine, theirs = self._keys(), other._keys()  # both ascending, so the first match has the lowest class
        if not len(mine):
            return None
        place = torch.searchsorted(mine, theirs).clamp_(max=len(mine) - 1)
        i = first(mine[place] == theirs)
        return None if i is None else other._owner(i)

    def expand(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The members of the set of every label of a batch.

        Args:
            labels: integers (N,), each a class, on the device of the sets.

        Returns:
            Two int64 tensors (M,): the row of the batch, ascending, and a class of that row's set, ascending in a row.

        Raises:
            TypeError, ValueError: invalid labels; the error names the first one.

        Example:
            >>> ClassSets.from_groups([0, 0, 1]).expand(torch.tensor([2, 1]))
            (tensor([0, 1, 1]), tensor([2, 0, 1]))
        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a torch.Tensor of class indices (N,), got {type(labels).__name__}")
        if labels.device != self.offsets.device:
            raise ValueError(
                f"labels is on {labels.device} and the sets on {self.offsets.device}: move one of them, "
                f"e.g. sets.to({str(labels.device)!r})"
            )
        labels = as_integers(labels, "labels", "(N,)", least=0)
        if (i := first((labels < 0) | (labels >= len(self)))) is not None:
            raise ValueError(f"labels[{i}] = {labels[i]}: expected a class in [0, {len(self)})")
        starts = self.offsets[labels]
        counts = self.offsets[labels + 1] - starts
        members = slices(self.indices, starts, counts)
        rows = torch.arange(len(labels), device=labels.device)
        return rows.repeat_interleave(counts, output_size=len(members)), members

    @classmethod
    def from_lists(cls, lists: Sequence[Iterable[int]], *, include_label: bool = True) -> ClassSets:
        """Sets from one iterable of classes for every class, in any order; duplicates are removed.

        Args:
            lists: V iterables of ints in [0, V).
            include_label: add every class to its own set. False, for wrong classes: a class in its own list is an
                error.

        Raises:
            TypeError: a list that contains anything other than ints.
            ValueError: no lists, a class out of range, or a class in its own list with include_label=False.

        Example:
            >>> ClassSets.from_lists([[2, 1], [], [0]], include_label=False).row(0)
            tensor([1, 2])
        """
        flat, ends, V = array("q"), [0], len(lists)
        if V == 0:
            raise ValueError("lists is empty: expected one list of classes for every class")
        for y, classes in enumerate(lists):
            try:
                flat.extend(iter(classes))
            except (TypeError, OverflowError) as error:
                raise TypeError(f"lists[{y}]: expected an iterable of int classes in [0, {V}) ({error})") from error
            ends.append(len(flat))
        members, offsets = torch.from_numpy(np.asarray(flat)), torch.tensor(ends, device="cpu")
        every = torch.arange(V + 1, device="cpu")
        owners = every[:-1].repeat_interleave(offsets.diff())
        if (i := first((members < 0) | (members >= V))) is not None:
            raise ValueError(f"lists[{owners[i]}] holds {members[i]}: expected a class in [0, {V})")
        keys = owners * V + members
        if include_label:
            keys = torch.cat([keys, every[:-1] * (V + 1)])
        elif (i := first(members == owners)) is not None:
            raise ValueError(
                f"lists[{owners[i]}] holds class {owners[i]} itself, with include_label=False: remove it, or pass "
                "include_label=True"
            )
        keys = keys.unique()
        return cls(torch.searchsorted(keys, every * V), keys % V)

    @classmethod
    def from_groups(cls, labels_of_classes: object, *, include_label: bool = True) -> ClassSets:
        """The set of a class contains every class of its group. The number of members is the sum of the squared group
        sizes.

        Args:
            labels_of_classes: integers (V,), the group of every class; any numbers, a tensor, an array or a list.
            include_label: False excludes every class from its own set.

        Raises:
            TypeError, ValueError: not integers (V,), or more than 2**31 members; the error names the largest group.

        Example:
            >>> ClassSets.from_groups([7, 3, 7], include_label=False).row(0)
            tensor([2])
        """
        groups, order = as_integers(labels_of_classes, "labels_of_classes", "(V,)").sort(stable=True)
        names, ranks, sizes = groups.unique_consecutive(return_inverse=True, return_counts=True)
        group = torch.empty_like(order)
        group[order] = ranks
        return cls._shared(order, sizes, group, include_label, lambda g: f"group {names[g]}")

    @classmethod
    def from_taxonomy(
        cls, parent: object, *, classes: object = None, levels: int = 1, include_label: bool = True
    ) -> ClassSets:
        """The set of a class contains the classes in the subtree of its ancestor `levels` up, or of its root if that is
        nearer.

        Takes O(V depth) time.

        Args:
            parent: integers (M,), the parent of every node, -1 at a root; a tensor, an array or a list.
            classes: integers (V,), the node of every class, each once. Default: the leaves, ascending.
            levels: number of levels from the class to the ancestor, at least 1.
            include_label: False excludes every class from its own set.

        Raises:
            TypeError, ValueError: a parent or class that is not a node, a cycle (the error names a node on it), a node
                that is given for two classes, or more than 2**31 members (it names the node with the most classes).

        Example:
            >>> sets = ClassSets.from_taxonomy([-1, 0, 0, 1, 1, 2])  # the classes are the leaves 3, 4 and 5
            >>> sets.row(0), sets.row(2)
            (tensor([0, 1]), tensor([2]))
        """
        levels = at_least_one(levels, "levels")
        parent = as_integers(parent, "parent", "(M,)")
        M, device = len(parent), parent.device
        if (i := first((parent < -1) | (parent >= M))) is not None:
            raise ValueError(f"parent[{i}] = {parent[i]}: expected a node in [0, {M}), or -1 at a root")
        refuse_cycles(parent)
        if classes is None:
            classes = (torch.bincount(parent + 1, minlength=M + 1)[1:] == 0).nonzero().squeeze(1)
        classes = as_integers(classes, "classes", "(V,)").to(device)
        if (i := first((classes < 0) | (classes >= M))) is not None:
            raise ValueError(f"classes[{i}] = {classes[i]}: expected a node in [0, {M})")
        if (i := first(torch.bincount(classes, minlength=M) > 1)) is not None:
            raise ValueError(f"classes holds node {i} more than once: expected one class for a node")

        top = classes
        for _ in range(levels):
            above = parent[top]
            if not (rises := above >= 0).any():
                break
            top = torch.where(rises, above, top)
        V = len(classes)
        wanted = torch.zeros(M, dtype=torch.bool, device=device)
        wanted[top] = True
        node, label, keys = classes, torch.arange(V, device=device), []
        while len(node):  # one level of every class's ancestors at a time
            chosen = wanted[node]
            keys.append(node[chosen] * V + label[chosen])
            above = parent[node]
            node, label = above[above >= 0], label[above >= 0]
        pairs = torch.cat(keys).sort().values
        sizes = torch.bincount(pairs // V, minlength=M)
        return cls._shared(pairs % V, sizes, top, include_label, lambda a: f"the subtree of node {a}")

    @classmethod
    def from_embeddings(cls, class_vectors: object, k: int, *, include_label: bool = True) -> ClassSets:
        """The k nearest other classes by cosine similarity, ties to the lower class; all others if there are fewer.

        Takes O(V^2 D) time, and memory for a copy of the vectors and, for V up to 2 million, less than 64 MB besides
        the result. After two seconds it shows a progress bar if tqdm is installed.

        Args:
            class_vectors: floating point (V, D), one vector for every class; a tensor, an array or a list.
            k: number of nearest classes, at least 1.
            include_label: add every class to its own set, in addition to the k.

        Raises:
            TypeError, ValueError: not floating point (V, D), or a zero or non-finite vector; the error names its class.

        Example:
            >>> ClassSets.from_embeddings([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]], k=1).row(2)
            tensor([1, 2])
        """
        vectors = as_tensor(class_vectors, "class_vectors", "floating point (V, D)")
        if not vectors.dtype.is_floating_point:
            raise TypeError(f"class_vectors has dtype {vectors.dtype}: expected floating point")
        if vectors.dim() != 2 or not vectors.numel():
            raise ValueError(f"class_vectors has shape {tuple(vectors.shape)}: expected (V, D), both at least 1")
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        largest = torch.linalg.vector_norm(vectors, torch.inf, dim=1, keepdim=True)
        if (y := first(~((largest > 0) & largest.isfinite()).squeeze(1))) is not None:
            what = "is zero" if largest[y] == 0 else "holds NaN or infinity"
            raise ValueError(f"class_vectors[{y}] {what}: expected a finite vector with a direction for every class")
        vectors = vectors / largest  # so that squares neither overflow nor underflow
        vectors /= torch.linalg.vector_norm(vectors, dim=1, keepdim=True)

        def similarities(begin: int, end: int) -> Tensor:
            return torch.mm(vectors[begin:end], vectors.T)

        return cls._nearest(similarities, len(vectors), vectors.element_size(), k, -torch.inf, include_label)

    @classmethod
    def from_confusion(cls, matrix: object, k: int, *, include_label: bool = True) -> ClassSets:
        """The k classes that a class was most often mistaken for, ties to the lower class; fewer if fewer occur.

        Args:
            matrix: numbers (V, V) >= 0; matrix[y, j] is the number of times that class y was predicted as class j. A
                tensor, an array or a list; the diagonal is not read.
            k: largest number of classes, at least 1.
            include_label: add every class to its own set, in addition to the k.

        Raises:
            TypeError, ValueError: not numbers (V, V), or a count that is negative or NaN; the error names its indices.

        Example:
            >>> ClassSets.from_confusion([[9, 0, 2], [1, 8, 1], [0, 0, 5]], k=1, include_label=False).row(1)
            tensor([0])
        """
        counts = as_tensor(matrix, "matrix", "counts (V, V)")
        if counts.dtype.is_complex:
            raise TypeError(f"matrix has dtype {counts.dtype}: expected integers or floating point")
        if counts.dim() != 2 or counts.shape[0] != counts.shape[1] or not counts.numel():
            raise ValueError(f"matrix has shape {tuple(counts.shape)}: expected (V, V) with at least one class")
        dtype = counts.dtype if counts.dtype.is_floating_point else torch.int64

        def taken_for(begin: int, end: int) -> Tensor:
            block = counts[begin:end].to(dtype, copy=True)
            block.diagonal(begin).zero_()
            if (i := first(~(block >= 0).flatten())) is not None:
                y, j = divmod(i, len(counts))
                raise ValueError(f"matrix[{begin + y}, {j}] = {block[y, j]}: expected a count >= 0")
            return block

        return cls._nearest(taken_for, len(counts), dtype.itemsize, k, 0, include_label)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file. An existing file is replaced only when the new one is complete.

        Raises:
            ImportError: safetensors is not installed.
            OSError, safetensors.SafetensorError: the file cannot be written.
        """
        save({"offsets": self.offsets, "indices": self.indices}, path, _METADATA)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassSets:
        """The sets from a file that `save` wrote, on the CPU.

        Raises:
            ImportError: safetensors is not installed.
            OSError: the file cannot be read.
            ValueError: the file is broken or has other contents; the error names it.
        """
        return load(path, _METADATA, lambda found: cls(found("offsets"), found("indices")))

    @classmethod
    def _shared(
        cls, members: Tensor, sizes: Tensor, choice: Tensor, include_label: bool, name: Callable[[int], str]
    ) -> ClassSets:
        """Sets that classes share: `members` contains sets of `sizes` one after another. Class y has set choice[y],
        which contains y."""
        counts = sizes[choice]
        total = int(counts.sum())
        if total > _LIMIT:
            largest = int(choice[counts.argmax()])
            raise ValueError(
                f"the sets would hold {total:,} members, more than 2**31: the largest, {name(largest)}, has "
                f"{int(sizes[largest]):,} classes, each a member of every other's set; split it"
            )
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        sets = cls(offsets, slices(members, (sizes.cumsum(0) - sizes)[choice], counts))
        if include_label:
            return sets
        kept = sets.indices[sets.indices != sets._owners()]
        return cls(offsets - torch.arange(len(offsets), device=offsets.device), kept)

    @classmethod
    def _nearest(
        cls, scores: Callable[[int, int], Tensor], V: int, itemsize: int, k: int, least: float, include_label: bool
    ) -> ClassSets:
        """The k other classes with the largest scores above `least`; scores(begin, end) returns rows of (V, V)."""
        k = min(at_least_one(k, "k"), V - 1)
        step = max(1, _BLOCK_BYTES // (V * itemsize))
        counts, indices = [], []
        for begin in progress(range(0, V, step), "class sets"):
            block = scores(begin, min(begin + step, V))
            block.diagonal(begin).fill_(least)
            chosen = largest_in(block, k) & (block > least)
            if include_label:
                chosen.diagonal(begin).fill_(True)
            counts.append(chosen.sum(1, dtype=torch.int32))
            indices.append(chosen.nonzero(as_tuple=True)[1].contiguous())
        sizes = torch.cat(counts).long()
        return cls(torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]), torch.cat(indices))

    def _owner(self, i: int) -> int:
        """The class whose set contains indices[i]."""
        return int(torch.searchsorted(self.offsets, i, right=True)) - 1

    def _owners(self) -> Tensor:
        """(members,) int64: the class whose set contains each member."""
        classes = torch.arange(len(self), device=self.offsets.device)
        return classes.repeat_interleave(self.offsets.diff(), output_size=len(self.indices))

    def _keys(self) -> Tensor:
        """(members,) int64, ascending: one unique number for each pair of a class and a member."""
        return self._owners().mul_(len(self)).add_(self.indices)
