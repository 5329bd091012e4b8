"""Instructions in which the threads of a warp exchange values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .instructions import TYPES, Array
from .parse import Instruction, vector
from .registers import Active, Frame

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[[Active], None]
_REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "any": np.logical_or, "all": np.logical_and,
}  # fmt: skip


def collective_of(instruction: Instruction, frame: Frame, machine: Machine) -> Run | None:
    """How it runs; None if it is no such instruction."""
    kinds = {"shfl": _shuffle, "redux": _reduce, "vote": _reduce, "ldmatrix": _matrix, "stmatrix": _matrix}
    make = kinds.get(instruction.opcode)
    return make(instruction, frame, machine) if make and "sync" in instruction.modifiers else None


def _shuffle(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    """Among all threads of a warp."""
    target, source, by, limits, _ = instruction.operands
    kind = instruction.modifiers[1]
    target, _, inside = target.partition("|")
    read, step, limit = frame.reader(source, "b32"), frame.reader(by, "s32"), frame.reader(limits, "u32")
    write, found = frame.writer(target, "b32"), frame.writer(inside or "_", "pred")

    def run(active: Active) -> None:
        machine.together(active)
        if (active.of(limit(active)) != (0 if kind == "up" else 31)).any():
            raise NotImplementedError(f"tests/ptx has no parts of a warp: {instruction.text}")
        lane = machine.index[active.span] % 32
        here = np.arange(len(lane))
        steps = step(active)
        other = {"down": lane + steps, "up": lane - steps, "bfly": lane ^ steps, "idx": steps}[kind]
        good = (other >= 0) & (other < 32) & (here - lane + other < len(lane))
        values = np.broadcast_to(read(active), lane.shape)
        write(active, values[np.where(good, here - lane + other, here)])
        found(active, good)

    return run


def _warps(active: Active, machine: Machine) -> list[Array]:
    """The threads of each warp, as places in the slice."""
    places = active.threads - active.span.start
    warp = machine.shared.warp[active.threads]
    return [places[warp == each] for each in np.unique(warp)]


def _reduce(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    kind, how = instruction.modifiers[-1], instruction.modifiers[1]
    ballot = how == "ballot"
    read = frame.reader(instruction.operands[1], "pred" if instruction.opcode == "vote" else kind)
    write = frame.writer(instruction.operands[0], kind)

    def run(active: Active) -> None:
        machine.together(active)
        values = np.broadcast_to(read(active), active.mask.shape)
        found = np.zeros(values.shape, TYPES[kind])
        for warp in _warps(active, machine):
            if ballot:
                found[warp] = np.sum(values[warp].astype(np.uint32) << (machine.index[active.span][warp] % 32))
            else:
                found[warp] = _REDUCE[how].reduce(values[warp])
        write(active, found)

    return run


def _matrix(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    """8 x 8 matrices of 2 bytes: thread 8 i + r has the address of row r of matrix i, thread 4 r + c a pair."""
    load, transposed = instruction.opcode == "ldmatrix", "trans" in instruction.modifiers
    names, place = instruction.operands if load else reversed(instruction.operands)
    address, parts = frame.address(place), vector(names)
    readers = [] if load else [frame.reader(name, "b32") for name in parts]
    writers = [frame.writer(name, "b32") for name in parts] if load else []
    lane = np.arange(32)

    def run(active: Active) -> None:
        machine.together(active)
        at = np.broadcast_to(address(active), active.mask.shape)
        for i in range(len(parts)):
            word = np.zeros(active.mask.shape, np.uint32) if load else np.array(readers[i](active))
            for warp in _warps(active, machine):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    if transposed:
                        row, column = column, row
                    places = at[warp[8 * i + row]] + (2 * column).astype(np.uint64)
                    threads = warp + active.span.start
                    if load:
                        got = machine.shared.load(threads, places, 2)[:, 0]
                        word[warp] |= got.astype(np.uint32) << (16 * half)
                    else:
                        machine.shared.store(threads, places, (word[warp] >> (16 * half)).astype(np.uint16)[:, None])
            if load:
                writers[i](active, word)

    return run
