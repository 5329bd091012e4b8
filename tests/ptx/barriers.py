"""Where threads are, and the barriers at which they wait for others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .instructions import Array
from .memory import HazardError
from .parse import Instruction
from .registers import Active

if TYPE_CHECKING:
    from .machine import Machine


class Unit:
    """Threads that run until all of them wait: by place, deepest in calls first, those that are there.

    A group stalls at an instruction that needs whole warps until the others of its warps are there, too.
    """

    def __init__(self, span: slice) -> None:
        self.span = span
        self.groups: dict[tuple[int, int], Array] = {}
        self.stalled: dict[tuple[int, int], Array] = {}

    def add(self, key: tuple[int, int], mask: Array) -> None:
        if mask.any():
            for others in (self.groups, self.stalled):
                if key in others:
                    mask = mask | others.pop(key)
            self.groups[key] = mask


class Parked(NamedTuple):
    """Threads that wait, and where they go on."""

    unit: Unit
    key: tuple[int, int]
    active: Active

    def go_on(self) -> None:
        self.unit.add(self.key, self.active.mask)


class Barriers:
    """Those of the blocks, by number, and that of the cluster. They order what came before with what comes after.

    An access between the arrival at the cluster's barrier and the wait is taken as ordered: no kernel has one.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        count = len(machine.threads)
        self._waiting: dict[tuple[int, str], list[Parked]] = {}  # at a block's, by rank and number
        self._joining: list[Parked] = []  # at the cluster's
        self._arrived = np.zeros(count, bool)  # there
        self._passed = np.zeros(count, bool)  # all have arrived, and the thread has not waited yet

    def run_of(self, instruction: Instruction) -> Callable[[Active], None]:
        """How an instruction runs."""
        name, operands = instruction.name, instruction.operands
        if name == "bar.warp.sync":
            return self._warp
        if name in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and len(operands) == 1:
            return lambda active: self._wait(operands[0], active)
        if name.startswith("barrier.cluster.arrive") and "relaxed" not in name:
            return self._arrive
        if name.startswith("barrier.cluster.wait"):
            return self._join
        raise NotImplementedError(f"tests/ptx has no {name}: {instruction.text}")

    def end(self) -> None:
        """Threads have ended, which the others no longer wait for."""
        for rank, barrier in list(self._waiting):
            self._release(rank, barrier)
        self._complete()

    def _order(self, threads: Array, level: int) -> None:
        """Up to the warp (1), the block (2) or the cluster (3)."""
        self._machine.shared.ordered[1 : level + 1, threads] = self._machine.shared.time

    def _warp(self, active: Active) -> None:
        self._machine.together(active)
        self._order(active.threads, 1)

    def _wait(self, barrier: str, active: Active) -> None:
        self._machine.together(active)
        unit, key, _ = self._machine.park(active)
        ranks = self._machine.block[active.span]
        for rank in np.unique(ranks[active.mask]).tolist():
            parked = Parked(unit, key, active.those(ranks == rank))
            self._waiting.setdefault((rank, barrier), []).append(parked)
            self._release(rank, barrier)

    def _release(self, rank: int, barrier: str) -> None:
        """Threads of a block go on if all that are left wait at this barrier."""
        machine = self._machine
        waiting = self._waiting[rank, barrier]
        if sum(len(parked.active.threads) for parked in waiting) < (machine.alive & (machine.block == rank)).sum():
            return
        for parked in self._waiting.pop((rank, barrier)):
            self._order(parked.active.threads, 3 if machine.launch.cluster == 1 else 2)
            parked.go_on()

    def _arrive(self, active: Active) -> None:
        self._machine.together(active)
        if (self._arrived | self._passed)[active.threads].any():
            raise HazardError("a thread arrives twice")
        self._arrived[active.threads] = True
        self._complete()

    def _complete(self) -> None:
        """Once all threads that are left have arrived."""
        alive = self._machine.alive
        if not self._arrived.any() or not self._arrived[alive].all():
            return
        self._arrived[:] = False
        self._passed |= alive
        for parked in self._joining:
            self._pass(parked.active)
            parked.go_on()
        self._joining.clear()

    def _pass(self, active: Active) -> None:
        self._passed[active.threads] = False
        self._order(active.threads, 3)

    def _join(self, active: Active) -> None:
        self._machine.together(active)
        if not (self._arrived | self._passed)[active.threads].all():
            raise HazardError("a thread waits for the cluster without having arrived")
        if self._passed[active.threads].all():
            self._pass(active)
        else:
            self._joining.append(self._machine.park(active))
