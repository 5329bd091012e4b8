"""The measurements of a race: bytes by formula, rates, fractions of the floor, memory; as JSON, and as table rows."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import backends
from .._version import __version__
from .race import Race
from .shapes import Shape


@dataclass(frozen=True)
class Figures:
    """The measurements of one contestant."""

    median_ms: float
    rounds: int
    work: int  # bytes that have to be moved (or other units, see `unit`), by formula
    rate: float  # 1e9 units/s
    of_floor: float  # this rate over the floor's
    over_ours: float  # time over that of the first contestant
    over_floor: float  # time over that of the floor
    peak_bytes: int | None  # beyond the inputs, measured; None: not known
    seconds: list[float]  # every round's time


@dataclass(frozen=True)
class Goal:
    """A ratio of two contestants' times, and its goal."""

    over: str
    under: str
    ratio: float
    required: float
    aim: float | None
    at_most: bool

    @property
    def met(self) -> bool:
        return self.ratio <= self.required if self.at_most else self.ratio >= self.required


@dataclass(frozen=True)
class Result:
    """A race, as in the JSON file."""

    title: str
    rows: int
    classes: int
    used_by: str
    dtype: str
    unit: str  # what `work` counts: "B" for bytes
    floor: str
    isa: str
    threads: int
    device: str
    contestants: dict[str, Figures]  # ours first
    absent: dict[str, str]  # peers that are left out, and why
    goals: list[Goal] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        return Shape(self.rows, self.classes, self.used_by)

    @property
    def key(self) -> str:
        """The key that identifies the same race in two runs."""
        return f"{self.title}, {self.shape}, {self.dtype}, {self.threads} threads"

    @classmethod
    def of(
        cls,
        title: str,
        race: Race,
        shape: Shape,
        dtype: torch.dtype,
        floor: str,
        *,
        peaks: Mapping[str, int | None],
        absent: Mapping[str, str],
        unit: str = "B",
        device: str = "cpu",
    ) -> Result:
        """The result of a finished race; `floor` names the contestant that only moves the necessary bytes."""
        times = {name: statistics.median(seconds) for name, seconds in race.seconds.items()}
        work = {c.name: c.work(shape, dtype) for c in race.contestants}
        ours = race.contestants[0].name
        best = work[floor] / times[floor]
        figures = {
            name: Figures(
                median_ms=1e3 * seconds,
                rounds=len(race.seconds[name]),
                work=work[name],
                rate=work[name] / seconds / 1e9,
                of_floor=work[name] / seconds / best,
                over_ours=seconds / times[ours],
                over_floor=seconds / times[floor],
                peak_bytes=peaks.get(name),
                seconds=[round(s, 9) for s in race.seconds[name]],
            )
            for name, seconds in times.items()
        }
        return cls(
            title=title,
            rows=shape.rows,
            classes=shape.classes,
            used_by=shape.used_by,
            dtype=str(dtype).removeprefix("torch."),
            unit=unit,
            floor=floor,
            isa=isa(),
            threads=torch.get_num_threads(),
            device=device,
            contestants=figures,
            absent=dict(absent),
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Result:
        """The result from a dictionary of `asdict`."""
        figures = {name: Figures(**f) for name, f in found["contestants"].items()}
        return cls(**{**found, "contestants": figures, "goals": [Goal(**g) for g in found["goals"]]})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def goal(self, over: str, under: str, required: float, aim: float | None, *, at_most: bool) -> Goal:
        """Time of `over` / time of `under`, and the goal: at least, or at most."""
        ratio = self.contestants[over].median_ms / self.contestants[under].median_ms
        found = Goal(over, under, ratio, required, aim, at_most)
        self.goals.append(found)
        return found

    def table(self) -> Table:
        """The table for the terminal."""
        ours = next(iter(self.contestants))
        size = self.contestants[ours].work / 1e6
        note = f" ({self.used_by})" if self.used_by else ""
        how = f"{self.dtype}: {size:,.4g} M{self.unit}, {self.isa}, {self.threads} threads"
        rows = [
            (name, f"{f.median_ms:,.3f}", f"{f.rate:.2f}", f"{f.of_floor:.0%}", f"{f.over_ours:.2f}",
             "" if f.peak_bytes is None else f"{f.peak_bytes / 2**20:,.1f}")
            for name, f in self.contestants.items()
        ]  # fmt: skip
        header = ("", "median ms", f"G{self.unit}/s", f"of {self.floor}", f"/ {ours}", "peak MiB")
        goals = [
            (f"{g.over} / {g.under}", f"{g.ratio:.2f}", f"{'<=' if g.at_most else '>='} {g.required:g}",
             "" if g.aim is None else f"{g.aim:g}", "yes" if g.met else "NO")
            for g in self.goals
        ]  # fmt: skip
        rows += [(name, why, "", "", "", "") for name, why in self.absent.items()]
        return Table(f"{self.title}, {self.shape} {how}{note}", header, rows, goals)


@dataclass(frozen=True)
class Table:
    """The table of one benchmark for the terminal."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    goals: Sequence[tuple[str, ...]] = ()


def isa() -> str:
    """Instruction set of the native kernels, or "" where they are missing."""
    native: Any = backends.load("native")
    return "" if isinstance(native, str) else str(native.isa())


def processor() -> str:
    """The system's name of the processor, and the number of threads of this process."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def machine(device: str = "cpu") -> dict[str, str]:
    """The machine and the versions of a measurement."""
    native: Any = backends.load("native")
    compiler = "" if isinstance(native, str) else native._native.COMPILER
    found = {"processor": processor(), "instruction set": isa(), "compiler": compiler}
    if device != "cpu":
        found["device"] = torch.get_device_module(torch.device(device)).get_device_properties(0).name
    return {**found, "torch": str(torch.__version__), "cudfast": __version__, "python": platform.python_version()}
