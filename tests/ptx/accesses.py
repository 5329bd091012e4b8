"""Instructions that read and write memory, copy to shared memory, or turn addresses of one space into another's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .instructions import TYPES, UNSIGNED, Array, size_of
from .memory import RANK, WINDOW, HazardError
from .parse import Instruction, vector
from .registers import Active, Frame

if TYPE_CHECKING:
    from .machine import Machine

Run = Callable[[Active], None]


def access_of(instruction: Instruction, frame: Frame, machine: Machine) -> Run | None:
    """How it runs; None if it is no such instruction."""
    kinds = {"ld": _load, "st": _store, "mov": _move, "cvta": _convert, "mapa": _map, "cp": _copy}
    make = kinds.get(instruction.opcode)
    return make(instruction, frame, machine) if make else None


def _space(instruction: Instruction) -> str:
    found = [m.partition("::")[0] for m in instruction.modifiers]
    return next((m for m in found if m in ("global", "shared", "param", "local", "const")), "")


def _shape(instruction: Instruction) -> tuple[str, int]:
    """The type of an element, and how many a vector has."""
    kind = next(m for m in reversed(instruction.modifiers) if m in TYPES)
    return kind, next((int(m[1:]) for m in instruction.modifiers if re.fullmatch(r"v\d", m)), 1)


def _check_alignment(at: Array, size: int) -> None:
    if (at % np.uint64(size)).any():
        raise HazardError(f"an access of {size} bytes that is not aligned")


def _split(space: str, at: Array) -> Array:
    """Which addresses are of shared memory."""
    if space == "shared":
        return np.ones(len(at), bool)
    return at >= np.uint64(WINDOW) if space == "" else np.zeros(len(at), bool)


def _is_cluster(instruction: Instruction, space: str) -> bool:
    return space == "" or "shared::cluster" in instruction.modifiers


def _variable(operand: str) -> str:
    return operand.strip("[] ").partition("+")[0].strip()


def _word(operand: str) -> int:
    """The word of a parameter of a call that an operand names: a structure has several."""
    offset = int(operand.strip("[] ").partition("+")[2] or 0)
    if offset % 8:
        raise NotImplementedError(f"tests/ptx has no part of a word of a parameter: {operand}")
    return offset // 8


def _load(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    space, (kind, count) = _space(instruction), _shape(instruction)
    targets, source = vector(instruction.operands[0]), instruction.operands[1]
    size = size_of(kind)
    if space == "param" and not frame.known(_variable(source)) and not machine.is_argument(_variable(source)):
        stored, write = frame.parameter(_variable(source), _word(source)), frame.writer(targets[0], kind)
        return lambda active: write(active, stored[active.span].astype(UNSIGNED[size]).view(TYPES[kind]))
    address, writers = frame.address(source), [frame.writer(name, kind) for name in targets]
    cluster = _is_cluster(instruction, space)
    memory = machine.constants if space == "param" else machine.memory
    used = np.array([instruction.used >> i & 1 for i in range(size * count)], bool)

    def run(active: Active) -> None:
        at = active.of(address(active))
        _check_alignment(at, size * count)
        shared = _split(space, at)
        values = np.empty((len(at), count), UNSIGNED[size])
        if shared.any():
            values[shared] = machine.shared.load(active.threads[shared], at[shared], size, used, cluster)
        if not shared.all():
            values[~shared] = memory.load(at[~shared], size, count)
        for i, write in enumerate(writers):
            write(active, active.spread(np.ascontiguousarray(values[:, i]).view(TYPES[kind])))

    return run


def _store(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    space, (kind, count) = _space(instruction), _shape(instruction)
    target, sources = instruction.operands[0], vector(instruction.operands[1])
    size = size_of(kind)
    bits = f"b{8 * size}"
    readers = [frame.reader(name, bits) for name in sources]
    if space == "param":
        stored, (read,) = frame.parameter(_variable(target), _word(target)), readers
        return lambda active: active.assign(stored, np.asarray(read(active)).astype(np.uint64))
    address, cluster = frame.address(target), _is_cluster(instruction, space)

    def run(active: Active) -> None:
        at = active.of(address(active))
        _check_alignment(at, size * count)
        shared = _split(space, at)
        values = np.stack([active.of(read(active)) for read in readers], axis=1)
        if shared.any():
            machine.shared.store(active.threads[shared], at[shared], values[shared], cluster)
        if not shared.all():
            machine.memory.store(at[~shared], values[~shared])

    return run


def _move(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    """Of a register, or between one and its parts in braces, the low one first."""
    (kind,) = instruction.modifiers
    targets, sources = (vector(operand) for operand in instruction.operands)
    parts = max(len(targets), len(sources))
    part = f"b{8 * size_of(kind) // parts}" if kind != "pred" else kind
    if parts == 1:
        (source,), (target,) = sources, targets
        read, write = frame.reader(source, kind), frame.writer(target, kind)
        return lambda active: write(active, read(active))
    bits = 8 * size_of(part)
    if len(targets) > 1:
        read = frame.reader(sources[0], f"b{bits * parts}")
        writers = [frame.writer(name, part) for name in targets]

        def unpack(active: Active) -> None:
            word = np.asarray(read(active))
            for i, write in enumerate(writers):
                write(active, (word >> (bits * i)).astype(TYPES[part]))

        return unpack
    readers, whole = [frame.reader(name, part) for name in sources], f"b{bits * parts}"
    write = frame.writer(targets[0], whole)

    def pack(active: Active) -> None:
        words = (np.asarray(read(active)).astype(TYPES[whole]) << (bits * i) for i, read in enumerate(readers))
        write(active, np.bitwise_or.reduce(np.broadcast_arrays(*words)))

    return pack


def _convert(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    """cvta: only addresses of shared memory differ from generic ones."""
    target, source = instruction.operands
    read, write = frame.reader(source, "b64"), frame.writer(target, "b64")
    if "shared" not in instruction.modifiers:
        return lambda active: write(active, read(active))
    if "to" in instruction.modifiers:
        return lambda active: write(active, read(active) & np.uint64(0xFFFFFFFF))
    own = (machine.block.astype(np.uint64) + 1) << np.uint64(RANK)
    return lambda active: write(active, (read(active) | own[active.span]) + np.uint64(WINDOW))


def _map(instruction: Instruction, frame: Frame, machine: Machine) -> Run:
    """mapa: the same place in another block of the cluster."""
    target, source, rank = instruction.operands
    kind = f"b{instruction.modifiers[-1][1:]}"
    read, ranks, write = frame.reader(source, kind), frame.reader(rank, "u32"), frame.writer(target, kind)

    def run(active: Active) -> None:
        block = np.asarray(ranks(active)).astype(TYPES[kind])
        if (active.of(block) >= machine.launch.cluster).any():
            raise HazardError(f"mapa asks for a block that the cluster of {machine.launch.cluster} does not have")
        at = read(active)
        write(active, (at & ~TYPES[kind](0xFF << RANK)) | ((block + TYPES[kind](1)) << TYPES[kind](RANK)))

    return run


def _copy(instruction: Instruction, frame: Frame, machine: Machine) -> Run | None:
    """cp.async, in groups of each thread. (There are no bulk copies yet.)"""
    name = instruction.name
    if name == "cp.async.commit_group":
        return lambda active: machine.shared.commit(active.threads)
    if name == "cp.async.wait_all":

        def wait_all(active: Active) -> None:
            machine.shared.commit(active.threads)
            machine.shared.wait(active.threads, 0, machine.memory)

        return wait_all
    if name == "cp.async.wait_group":
        later = int(instruction.operands[0])
        return lambda active: machine.shared.wait(active.threads, later, machine.memory)
    if not re.match(r"cp\.async\.c[ag]\.shared(::cta)?\.global", name) or len(instruction.operands) > 4:
        return None
    to, source = (frame.address(operand) for operand in instruction.operands[:2])
    size = int(instruction.operands[2], 0)

    def run(active: Active) -> None:
        places, origin = (active.of(address(active)) for address in (to, source))
        for at in (places, origin):
            _check_alignment(at, size)
        machine.shared.copy(active.threads, places, origin, size)

    return run
