"""`python -m cudfast bench`: checks and times the losses beside PyTorch on this machine."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from .. import backends
from .cases import make
from .compare import CONFIDENCE, Change, compare, read
from .contestants import CUD, DUS, Contestant, Entry, waiting, yardsticks
from .memory import peak
from .race import BUDGET, Race
from .result import Result, Table, machine
from .shapes import SHAPES, Shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOSSES = {"cud": CUD, "dus": DUS}
DEFAULT = ("Banking77", "ImageNet", "Llama 2", "Llama 3")
ROUNDS, SMALL_ROUNDS, SMALL_WARM = 20, 300, 5


def shape_of(text: str) -> Shape:
    """A shape by the name of a task, or as NxV.

    Example:
        >>> print(shape_of("512x32000"), shape_of("Llama 3"), sep=", ")
        512 x 32,000, 128 x 128,256
    """
    if text in SHAPES:
        return SHAPES[text]
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NxV, as 512x32000, or one of {', '.join(SHAPES)}")
    return Shape(int(found[1]), int(found[2]))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds, no torch.compile")
    parser.add_argument("--loss", choices=LOSSES, nargs="+", default=["cud"], help="default: cud")
    parser.add_argument(
        "--shape", type=shape_of, nargs="+", metavar="SHAPE", help=f"NxV, or a name: {', '.join(SHAPES)}"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["float32"], help="default: float32")
    parser.add_argument("--backend", choices=("auto", *backends.NAMES), default="auto", help="default: auto")
    parser.add_argument("--device", default="cpu", help="device of the logits: cpu (default), cuda, xpu")
    parser.add_argument("--no-compile", action="store_true", help="do not time torch.compile")
    parser.add_argument("--json", type=Path, metavar="NEW.json", help="write the measurements")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="show what became slower; exit with 1 if any")


def contestants(entry: Entry, shape: Shape, dtype: torch.dtype, asked: argparse.Namespace) -> list[Contestant]:
    """The implementations for one shape, after the comparison with float64.

    Raises:
        AssertionError: a result of the library is wrong.
    """
    data = make(shape, dtype, asked.device)
    ours = entry.ours(data, backend=asked.backend)
    entry.check(ours, data)
    peers = entry.pytorch(data, compile=not (asked.no_compile or asked.quick))
    return waiting([*ours, *peers, *yardsticks(data), entry.floor(data)], asked.device)


def race(entry: Entry, shape: Shape, dtype: torch.dtype, asked: argparse.Namespace, progress: Progress) -> Result | str:
    """The times of one shape, or the reason why there are none."""
    part = 4 if asked.quick else 1
    what = f"{entry.title} {shape} {str(dtype)[6:]}"
    task = progress.add_task(f"{what}: correctness", total=None)
    try:
        running = Race(contestants(entry, shape, dtype, asked), warm=SMALL_WARM if shape.small else 0)
    except AssertionError as error:
        return f"{what}: no times, its numbers are wrong: {error}"
    rounds = running.fit((SMALL_ROUNDS if shape.small else ROUNDS) // part, BUDGET / part)
    progress.update(task, description=what, total=rounds)
    for _ in range(rounds):
        running.round()
        progress.advance(task)
    peaks = {c.name: peak_of(c, asked.device) for c in running.contestants}
    floor = running.contestants[-1].name
    return Result.of(entry.title, running, shape, dtype, floor, peaks=peaks, absent={}, device=asked.device)


def peak_of(contestant: Contestant, device: str = "cpu") -> int | None:
    """Peak memory of a call beyond its inputs, in bytes."""
    contestant.prepare()
    return peak(contestant.call, device)


def races(asked: argparse.Namespace, console: Console) -> Iterator[Result | str]:
    shapes = asked.shape or [SHAPES[name] for name in (DEFAULT[:3] if asked.quick else DEFAULT)]
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    for loss in asked.loss:
        for dtype in asked.dtype:
            for shape in shapes:
                with Progress(*columns, console=console, transient=True) as progress:
                    found = race(LOSSES[loss], shape, DTYPES[dtype], asked, progress)
                yield found


def show(table: Table, console: Console) -> None:
    """Prints a table, and the goals below it."""
    for header, rows in ((table.header, table.rows), (("ratio", "measured", "required", "aim", "met"), table.goals)):
        if not rows and header is not table.header:
            continue
        drawn = RichTable(box=None, header_style="bold", pad_edge=False)
        for i, cell in enumerate(header):
            drawn.add_column(cell, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            drawn.add_row(*row)
        if header is table.header:
            console.print(f"\n{table.title}", style="bold", markup=False, highlight=False)
        console.print(drawn, markup=False, highlight=False)


def show_changes(changes: Sequence[Change], console: Console) -> None:
    """Prints the differences from an older run."""
    rows = [(f"{c.what}: {c.contestant}", f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}", c.verdict) for c in changes]
    header = ("now / then, both relative to the floor", "ratio", f"{CONFIDENCE:.0%} interval", "")
    show(Table("Compared with the older run", header, rows), console)


def main(asked: argparse.Namespace, console: Console | None = None) -> int:
    """Runs the command. Exit status: 1 after wrong results or a regression, 2 if nothing can be run."""
    console = console or Console()
    try:
        backends.choose(asked.backend, torch.device(asked.device))
        torch.empty(0, device=asked.device)
        old = read(asked.compare) if asked.compare else []
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        print(error, file=sys.stderr)
        return 2
    facts = machine(asked.device)
    for name, value in facts.items():
        console.print(f"{name:<16} {value}", markup=False, highlight=False)
    found: list[Result] = []
    wrong = False
    for outcome in races(asked, console):
        if isinstance(outcome, str):
            wrong = True
            console.print(outcome, style="red", markup=False)
        else:
            found.append(outcome)
            show(outcome.table(), console)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": facts, "races": [r.to_json() for r in found]}, indent=1))
        console.print(f"\nWritten: {asked.json}", markup=False, highlight=False)
    changes = compare(old, found)
    if asked.compare:
        show_changes(changes, console)
    return 1 if wrong or any(c.verdict == "slower" for c in changes) else 0
