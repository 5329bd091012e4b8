"""What the threads of a cluster share, and which of their accesses a barrier orders."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from .instructions import UNSIGNED, Array

# A shared address is the block's rank plus 1, or 0 for the thread's own, in its fourth byte, and an offset below it.
# A generic address of shared memory adds this.
WINDOW = 1 << 62
RANK = 24


class HazardError(Exception):
    """A GPU may read something else here than the interpreter does, or fail."""


_BASE = 1 << 16
_BYTES: Any = np.ctypeslib.as_array((ctypes.c_uint8 * ((1 << 47) - _BASE - 8)).from_address(_BASE))
_PROCESS = {n: _BYTES[: len(_BYTES) // n * n].view(dtype) for n, dtype in UNSIGNED.items()}


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[Array, Array]:
    """Begins and ends of ranges of addresses, those that touch as one."""
    joined: list[list[int]] = [[0, 0]]
    for start, end in sorted(ranges):
        if start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    begins, ends = np.array(joined, np.uint64).T
    return begins, ends


class Global:
    """Global memory: this process's own, in the ranges of addresses that a launch was given. `constant` ranges, the
    kernel's arguments by their generic addresses, can only be read."""

    def __init__(self, ranges: Iterable[tuple[int, int]], constant: Iterable[tuple[int, int]] = ()) -> None:
        ranges = list(ranges)
        self._written, self._read = _joined(ranges), _joined([*ranges, *constant])

    def _places(self, ranges: tuple[Array, Array], at: Array, n: int, count: int) -> Array:
        """Indices (k, count) of elements of n bytes."""
        begins, ends = ranges
        found = np.searchsorted(begins, at, side="right") - 1
        if (at + n * count > ends[found]).any():
            raise HazardError("an access outside of the tensors of the launch")
        return ((at - _BASE) // n).astype(np.int64)[:, None] + np.arange(count)

    def load(self, at: Array, n: int, count: int) -> Array:
        return _PROCESS[n][self._places(self._read, at, n, count)]

    def store(self, at: Array, values: Array) -> None:
        n = values.dtype.itemsize
        _PROCESS[n][self._places(self._written, at, n, values.shape[1])] = values


class _Accesses:
    """Of each byte the last access, or several: the thread, how far apart those of several are, and the time."""

    def __init__(self, size: int) -> None:
        self.thread = np.zeros(size, np.int32)
        self.apart = np.zeros(size, np.int8)  # 0: one thread, 1: of a warp, 2: of a block, 3: of the cluster
        self.time = np.full(size, -1)


class Shared:
    """Shared memory of the blocks of a cluster, NaN until it is written.

    `ordered` (4, threads) holds when a barrier last ordered a thread after all accesses of itself, its warp, its block
    and its cluster. An access that meets another one, of which at least one is a write, must come later than that.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size, self.blocks = size, blocks
        self._bytes = np.full(blocks * size, 0xFF, np.uint8)
        self._written = np.zeros(blocks * size, bool)
        self._copied = np.zeros(blocks * size, bool)  # a copy is on its way
        self._reads, self._writes = _Accesses(blocks * size), _Accesses(blocks * size)
        thread = np.arange(blocks * threads)
        self.block = thread // threads
        self.warp = self.block * -(-threads // 32) + thread % threads // 32
        self.ordered = np.zeros((4, blocks * threads), np.int64)
        self.ordered[0] = np.iinfo(np.int64).max
        self.ended = np.zeros(blocks, bool)
        self.time = 0
        self._copies: list[tuple[Array, Array, Array, Array]] = []  # thread (k,), group (k,), to (k, n), from (k,)
        self._group = np.zeros(blocks * threads, np.int64)  # of the thread's next copy

    def _places(self, threads: Array, at: Array, size: int, cluster: bool) -> Array:
        """Indices (k, size) of bytes."""
        rank = (at >> RANK).astype(np.int64) & 0xFF
        own = self.block[threads]
        block = np.where(rank == 0, own, rank - 1)
        offset = (at & ((1 << RANK) - 1)).astype(np.int64)
        if (block >= self.blocks).any() or (not cluster and (block != own).any()):
            raise HazardError("an access to shared memory of a block that is not in the cluster")
        if (offset + size > self.size).any():
            raise HazardError(f"an access outside of the block's {self.size} bytes of shared memory")
        if self.ended[block].any():
            raise HazardError("an access to shared memory of a block that has ended")
        return (block * self.size + offset)[:, None] + np.arange(size)

    def _distance(self, a: Array, b: Array) -> Array:
        block, warp = self.block[a] != self.block[b], self.warp[a] != self.warp[b]
        return (a != b).astype(np.int8) + warp + block

    def _check(self, before: _Accesses, places: Array, threads: Array, what: str) -> None:
        time = before.time[places]
        if (time < self.ordered[1:, threads].min()).all():
            return
        apart = np.maximum(self._distance(before.thread[places], threads[:, None]), before.apart[places])
        wrong = time >= self.ordered[apart, threads[:, None]]
        if wrong.any():
            k, byte = np.argwhere(wrong)[0]
            place = places[k, byte]
            raise HazardError(
                f"{what} without a barrier between them: thread {threads[k]} after thread {before.thread[place]}, byte "
                f"{place % self.size} of block {place // self.size}"
            )

    def _note(self, after: _Accesses, places: Array, threads: Array, *, more: bool) -> None:
        """The accesses of one instruction; `more`: earlier ones that no barrier ordered before them still count."""
        each = np.broadcast_to(threads[:, None], places.shape)
        apart = np.zeros(places.shape, np.int8)
        if more:
            apart = np.maximum(self._distance(after.thread[places], each), after.apart[places])
            apart = np.where(after.time[places] < self.ordered[apart, each], 0, apart)
        after.apart[places] = 0
        after.thread[places] = each
        apart = np.maximum(apart, self._distance(after.thread[places], each))
        if apart.any():
            np.maximum.at(after.apart, places, apart)
        after.time[places] = self.time

    def load(self, threads: Array, at: Array, n: int, used: Array | None = None, cluster: bool = False) -> Array:
        """Elements of n bytes; `used`: for each byte of an access whether it is not padding. One element without it.

        A byte by itself may be padding, too, of a structure that is copied: it may be read before it is written.
        """
        everything = self._places(threads, at, n if used is None else len(used), cluster)
        places = everything if used is None or used.all() else everything[:, used]
        if self._copied[places].any():
            raise HazardError("a read of a copy that was not waited for")
        if places.shape[1] > 1 and not self._written[places].all():
            raise HazardError("a read of shared memory that was not written")
        self._check(self._writes, places, threads, "a read after a write")
        self._note(self._reads, places, threads, more=True)
        return self._bytes[everything].view(UNSIGNED[n])

    def _prepare(self, threads: Array, places: Array) -> None:
        if self._copied[places].any():
            raise HazardError("a write to where a copy goes that was not waited for")
        self._check(self._writes, places, threads, "a write after a write")
        self._check(self._reads, places, threads, "a write after a read")

    def store(self, threads: Array, at: Array, values: Array, cluster: bool = False) -> None:
        data = np.ascontiguousarray(values).view(np.uint8)
        places = self._places(threads, at, data.shape[1], cluster)
        self._prepare(threads, places)
        self._bytes[places] = data
        if (self._bytes[places] != data).any():
            raise HazardError("two threads write different values to one place")
        self._wrote(threads, places)

    def _wrote(self, threads: Array, places: Array) -> None:
        self._written[places] = True
        self._reads.time[places] = -1
        self._note(self._writes, places, threads, more=False)

    def copy(self, threads: Array, to: Array, source: Array, size: int) -> None:
        """Starts copies: nothing moves before `wait`, and until then nothing may touch the place."""
        places = self._places(threads, to, size, False)
        self._prepare(threads, places)
        self._bytes[places] = 0xFF
        self._copied[places] = True
        self._copies.append((threads, self._group[threads], places, source))

    def commit(self, threads: Array) -> None:
        self._group[threads] += 1

    def wait(self, threads: Array, later: int, memory: Global) -> None:
        """Until all groups of copies of these threads have moved but the `later` last ones."""
        these = np.zeros(len(self.block), bool)
        these[threads] = True
        waiting = []
        for thread, group, places, source in self._copies:
            done = these[thread] & (group < self._group[thread] - later)
            if done.any():
                self._copied[places[done]] = False
                self._bytes[places[done]] = memory.load(source[done], 1, places.shape[1])
                self._wrote(thread[done], places[done])
            if not done.all():
                waiting.append((thread[~done], group[~done], places[~done], source[~done]))
        self._copies = waiting

    def end(self, threads: Array) -> None:
        """These threads end."""
        if any(np.isin(thread, threads).any() for thread, *_ in self._copies):
            raise HazardError("a thread ends before its copies were waited for")
