"""Where the run is made: on a GPU, or on the CPU as a stand-in for one, with small shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cudfast.backends import available
from cudfast.bench.shapes import Shape
from cudfast.options import BackendName

from .clocks import Clock, GraphClock, HostClock


class Chip(NamedTuple):
    """The properties by which the CUDA backend lays rows over blocks (csrc/cuda/launch.cpp)."""

    processors: int
    shared: int  # bytes that a block may ask for
    clusters: tuple[int, ...]  # how many blocks may hold a row

    @classmethod
    def here(cls) -> Chip:
        """This GPU's, as far as the kernels were compiled for it."""
        from cudfast.backends import cuda

        found: Any = torch.cuda.get_device_properties(0)
        capability = min(10 * found.major + found.minor, max(map(int, cuda.ARCHITECTURES.split())))
        clusters = (1, 2, 4, 8) if capability >= 90 else (1,) if capability >= 80 else ()
        return cls(found.multi_processor_count, found.shared_memory_per_block_optin, clusters)


EMULATED = Chip(4, 227 << 10, (1, 2, 4, 8))  # csrc/cuda/run.h


def layouts(chip: Chip, dtype: torch.dtype) -> Iterator[tuple[str, Shape]]:
    """A shape for every way to lay rows of the student loss over blocks, far from where the next way begins."""
    fitting = chip.shared // (2 * dtype.itemsize)  # classes that a block holds
    many = 2 * chip.processors + 1  # blocks share rows when there are fewer
    for blocks in chip.clusters:
        yield f"rows held by {blocks} block{'s' * (blocks > 1)}", Shape(many, 3 * blocks * fitting // 4 // 16 * 16)
    yield "rows in two sweeps", Shape(many, 5 * max(chip.clusters, default=1) * fitting // 4 // 16 * 16)
    yield "rows shared by blocks", Shape(3, 300_000)


@dataclass(frozen=True)
class Place:
    """A device and the shapes that suit it."""

    device: str  # of torch
    memory: int  # bytes
    clock: Clock
    chip: Chip | None  # None: the CUDA backend is not there
    widths: tuple[int, ...] = (77, 1000, 4097, 32_000, 50_257, 128_256)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)
    races: tuple[Shape, ...] = tuple(
        Shape(n, v) for n in (4096, 16_384, 512) for v in (32_000, 128_256, 151_936, 262_144)
    )
    swept: tuple[Shape, ...] = tuple(Shape(4096, v) for v in (32_000, 128_256, 262_144))
    peers: tuple[Shape, ...] = tuple(Shape(4096, v) for v in (32_000, 128_256))
    watched: tuple[Shape, ...] = (Shape(3, 77), Shape(9, 4097), Shape(2, 300_000))
    projected: tuple[int, int] = (64, 5000)  # rows and classes of a Projection
    budget: int = 1 << 29  # bytes that the buffers of a timing rotate over, at least: ten times the L2 of an H100
    most: int = 1 << 24  # elements of a check
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def stand_in(self) -> bool:
        """Whether the CPU stands in for a GPU: times say nothing about one."""
        return self.device == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits that are timed."""
        return self.dtypes[0]

    def missing(self) -> dict[BackendName, str]:
        """The backends under test, with the reason if one is left out."""
        names: tuple[BackendName, ...] = ("cuda", "triton")
        found = {name: available()[name] for name in names}
        if torch.version.hip:
            found["cuda"] = "this is not an NVIDIA GPU"
        return found

    def backends(self) -> list[BackendName]:
        """Those that are there."""
        return [name for name, why in self.missing().items() if not why]

    def fits(self, bytes_: float) -> bool:
        """Whether that many bytes leave room for what PyTorch needs beside them."""
        return bytes_ <= 0.8 * self.memory

    def layouts(self, dtype: torch.dtype) -> Iterator[tuple[str, Shape]]:
        """`layouts` of this chip; the stand-in does only the smaller ones."""
        for what, shape in layouts(self.chip, dtype) if self.chip else ():
            if not self.stand_in or what in ("rows held by 1 block", "rows shared by blocks"):
                yield what, shape


def gpu() -> Place:
    """This machine's."""
    found = torch.cuda.get_device_properties(0)
    there = not available()["cuda"] and not torch.version.hip
    facts = {
        "device": f"{found.name}, {found.total_memory / 2**30:.0f} GiB",
        "capability": f"{found.major}.{found.minor}, {found.multi_processor_count} multiprocessors",
    }
    return Place("cuda", found.total_memory, GraphClock(), Chip.here() if there else None, facts=facts)


def stand_in() -> Place:
    """The CPU: Triton's interpreter and the emulation of CUDA, on shapes that they do in a moment."""
    tiny = (Shape(4, 77),)
    return Place(
        "cpu", 1 << 33, HostClock(), None if available()["cuda"] else EMULATED,
        widths=(77, 300), dtypes=(torch.float32,), races=tiny, swept=tiny, peers=tiny, watched=(Shape(3, 77),),
        projected=(8, 300), budget=1 << 12, most=1 << 10,
        facts={"device": "none: the CPU stands in for a GPU, and the times say nothing about one"},
    )  # fmt: skip
