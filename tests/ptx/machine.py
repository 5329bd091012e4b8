"""Runs the kernels of a module: the threads of a cluster, their order, barriers, jumps and calls."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .accesses import access_of
from .barriers import Barriers, Parked, Unit
from .collectives import collective_of
from .instructions import Array, value_of
from .memory import Global, HazardError, Shared
from .parse import Function, Instruction, Module
from .registers import Active, Frame

Run = Callable[[Active], None]
_NOTHING = ("nothing", "membar", "fence", "createpolicy", "griddepcontrol", "prefetch", "prefetchu", "discard")
_LIMIT = 20_000_000  # instructions of a launch: more is a loop without an end


class Launch(NamedTuple):
    """What a launch gives besides the kernel."""

    arguments: bytes
    grid: tuple[int, int]  # blocks, of which neighbours along the first axis are a cluster
    threads: int  # of a block
    shared: int = 0  # bytes of a block
    cluster: int = 1
    ranges: tuple[tuple[int, int], ...] = ()  # of addresses that the kernel may touch


class _MissingError(Exception):
    """Threads of a warp are elsewhere, and may come."""


class Machine:
    """A module's kernel and a launch. `seed`: None lets the warps run together, else one at a time in random order."""

    def __init__(self, module: Module, entry: Function, launch: Launch, seed: int | None = None) -> None:
        self.module, self.entry, self.launch = module, entry, launch
        self.random = None if seed is None else random.Random(seed)
        self.steps = 0  # instructions that units have run
        self._next: Any = None  # depth and place behind the instruction; None: it has placed its threads
        count = launch.cluster * launch.threads
        self.threads = np.arange(count)
        self.block, self.index = self.threads // launch.threads, self.threads % launch.threads
        arguments, symbols = self._arguments()
        given = [(arguments, arguments + len(launch.arguments))]
        self.constants, self.memory = Global(given), Global(launch.ranges, given)
        special = {
            "%tid.x": self.index, "%tid.y": 0, "%tid.z": 0, "%ntid.x": launch.threads, "%laneid": self.index % 32,
            "%nctaid.x": launch.grid[0], "%nctaid.y": launch.grid[1], "%ctaid.z": 0,
            "%cluster_ctarank": self.block, "%cluster_nctarank": launch.cluster,
        }  # fmt: skip
        self._special: dict[str, Array] = special
        self._symbols = symbols
        self._frames: dict[str, Frame] = {}
        self._runs: dict[int, Run] = {}
        size = 32 if self.random else count
        spans = [slice(i, min(i + size, count)) for i in range(0, count, size)]
        if self.random and launch.threads % 32:
            raise ValueError(f"{launch.threads} threads in random order: expected whole warps")
        self._units = [Unit(span) for span in spans]

    def _arguments(self) -> tuple[int, dict[str, int]]:
        """Where the arguments are, and the addresses of names."""
        launch = self.launch
        self._buffer = ctypes.create_string_buffer(launch.arguments, len(launch.arguments) + 1)
        address, offset = ctypes.addressof(self._buffer), 0
        symbols = {self.module.shared: 0} if self.module.shared else {}
        for name, size, alignment in self.entry.parameters:
            offset = -(-offset // alignment) * alignment
            symbols[name] = address + offset
            offset += size
        if offset != len(launch.arguments):
            raise ValueError(f"{self.entry.name}: expected {offset} bytes of arguments, got {len(launch.arguments)}")
        return address, symbols

    def is_argument(self, name: str) -> bool:
        """Whether it is a parameter of the kernel."""
        return any(name == p.name for p in self.entry.parameters)

    def run(self) -> int:
        """Runs every cluster of the grid, one after another; how many instructions that took.

        Raises:
            HazardError: the kernel's answer may depend on timing, or a GPU may refuse it.
        """
        with np.errstate(all="ignore"):
            for y in range(self.launch.grid[1]):
                for x in range(0, self.launch.grid[0], self.launch.cluster):
                    self._special["%ctaid.x"], self._special["%ctaid.y"] = x + self.block, y
                    self._cluster()
        return self.steps

    # One cluster.

    def _cluster(self) -> None:
        launch, count = self.launch, len(self.threads)
        self._frames.clear()
        self._runs.clear()
        self.shared = Shared(launch.cluster, launch.shared, launch.threads)
        self.alive = np.ones(count, bool)
        self._barriers = Barriers(self)
        self._callers: list[Array] = []  # by depth, the place behind each thread's call
        for unit in self._units:
            unit.add((0, self.entry.start), np.ones(unit.span.stop - unit.span.start, bool))
        while self.alive.any():
            ready = [unit for unit in self._units if unit.groups]
            self._last = not ready
            if not ready:
                ready = [unit for unit in self._units if unit.stalled]
                for unit in ready:
                    unit.groups, unit.stalled = unit.stalled, {}
            if not ready:
                raise HazardError("all threads that are left wait at barriers that others have passed")
            unit = self.random.choice(ready) if self.random else ready[0]
            left = self.random.randrange(1, 400) if self.random else _LIMIT
            while unit.groups and left > 0:
                left -= self._advance(unit)

    def _advance(self, unit: Unit) -> int:
        """Runs the deepest and first threads of a unit as far as the next ones, or a jump; how many instructions."""
        key = min(unit.groups)
        depth, place = key
        active = Active(unit.span, unit.groups.pop(key))
        others = [p for d, p in (*unit.groups, *unit.stalled) if d == depth and p > place]
        stop = min(others, default=len(self.module.code))
        began = self.steps
        while place < stop:
            run = self._runs.get(place)
            if run is None:
                run = self._runs[place] = self._decode(place)
            self.steps += 1
            self.shared.time += 1
            if self.steps > _LIMIT:
                raise HazardError("a loop that does not end")
            self._unit, self._next = unit, (depth, place + 1)
            try:
                run(active)
            except _MissingError:
                unit.stalled[depth, place] = active.mask
                return self.steps - began
            except HazardError as error:
                raise HazardError(f"{error}: {self.module.code[place].text}") from None
            if self._next is None:  # a jump or a barrier has placed the threads
                return self.steps - began
            place += 1
        unit.add((depth, place), active.mask)
        return self.steps - began

    def _place(self, key: tuple[int, int], active: Active) -> None:
        """Threads go on there, not behind the instruction."""
        self._unit.add(key, active.mask)
        self._next = None

    def frame(self, function: Function) -> Frame:
        if function.name not in self._frames:
            self._frames[function.name] = Frame(function, len(self.threads), self._special, self._symbols)
        return self._frames[function.name]

    def _decode(self, place: int) -> Run:
        instruction = self.module.code[place]
        function = self.module.function_at(place)
        run = self._plain(instruction, function)
        if not instruction.guard:
            return run
        guard = self.frame(function).reader("!" * instruction.negated + instruction.guard, "pred")

        def guarded(active: Active) -> None:
            after, those = self._next, active.those(guard(active))
            if those.mask.any():
                run(those)
            if self._next is None:
                self._unit.add(after, active.mask & ~those.mask)

        return guarded

    def _plain(self, instruction: Instruction, function: Function) -> Run:
        frame = self.frame(function)
        if instruction.opcode in _NOTHING:
            return lambda active: None
        control = {
            "bra": self._bra, "ret": self._ret, "exit": self._ret, "call": self._call, "returned": self._returned,
            "bar": self._bar, "barrier": self._bar, "trap": self._trap,
        }  # fmt: skip
        if instruction.opcode in control:
            return control[instruction.opcode](instruction, frame)
        if run := access_of(instruction, frame, self) or collective_of(instruction, frame, self):
            return run
        if value := value_of(instruction):
            targets = instruction.operands[0].split("|")
            writers = [frame.writer(name, kind) for name, kind in zip(targets, value.results)]
            readers = [frame.reader(name, kind) for name, kind in zip(instruction.operands[1:], value.sources)]
            if len(value.results) == 1:
                (write,) = writers
                return lambda active: write(active, value.compute(*[read(active) for read in readers]))

            def several(active: Active) -> None:
                for write, result in zip(writers, value.compute(*[read(active) for read in readers])):
                    write(active, result)

            return several
        raise NotImplementedError(f"tests/ptx has no {instruction.name}: {instruction.text}")

    # Jumps and calls.

    def _bra(self, instruction: Instruction, frame: Frame) -> Run:
        target = frame.function.labels[instruction.operands[0]]
        return lambda active: self._place((self._next[0], target), active)

    def _ret(self, instruction: Instruction, frame: Frame) -> Run:
        def run(active: Active) -> None:
            depth = self._next[0]
            if depth == 0:
                self._end(active)
                return
            back = self._callers[-depth - 1][active.span]
            for place in np.unique(back[active.mask]):
                self._place((depth + 1, int(place)), active.those(back == place))

        return run

    def _call(self, instruction: Instruction, frame: Frame) -> Run:
        name, _, *given = instruction.operands
        callee = self.module.functions[name]
        inner = self.frame(callee)
        pairs = [
            (inner.parameter(p.name, word), frame.parameter(g, word))
            for p, g in zip(callee.parameters, given)
            for word in range(-(-p.size // 8))
        ]

        def run(active: Active) -> None:
            depth, behind = self._next
            for to, source in pairs:
                active.assign(to, source[active.span])
            if len(self._callers) <= -depth:
                self._callers.append(np.zeros(len(self.threads), np.int64))
            active.assign(self._callers[-depth], behind)
            self._place((depth - 1, callee.start), active)

        return run

    def _returned(self, instruction: Instruction, frame: Frame) -> Run:
        name, result, *_ = instruction.operands
        if not result:
            return lambda active: None
        callee = self.module.functions[name]
        to, source = frame.parameter(result), self.frame(callee).parameter(callee.result)
        return lambda active: active.assign(to, source[active.span])

    def _bar(self, instruction: Instruction, frame: Frame) -> Run:
        return self._barriers.run_of(instruction)

    def _trap(self, instruction: Instruction, frame: Frame) -> Run:
        def run(active: Active) -> None:
            raise HazardError("a trap")

        return run

    def _end(self, active: Active) -> None:
        self._next = None
        self.shared.end(active.threads)
        self.alive[active.threads] = False
        for rank in range(self.launch.cluster):
            self.shared.ended[rank] = not self.alive[self.block == rank].any()
        self._barriers.end()

    def together(self, active: Active) -> None:
        """Makes sure that whole warps are here."""
        warp = self.shared.warp
        here = np.bincount(warp[active.threads], minlength=warp[-1] + 1)
        alive = np.bincount(warp[self.alive], minlength=warp[-1] + 1)
        if ((here > 0) & (here != alive)).any():
            if self._last:
                raise HazardError("threads of a warp are missing")
            raise _MissingError

    def park(self, active: Active) -> Parked:
        """Takes threads out, with where they go on behind the instruction."""
        assert self._next is not None
        parked, self._next = Parked(self._unit, self._next, active), None
        return parked
