"""Command line of the demo: ``python -m examples.cldr_names --help``, run from the root of the repository."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..common.cli import guarded, parser, positive, start_torch

_NEEDED = ("babel", "jinja2", "matplotlib", "rich")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    about = "Compare CUD with distillation baselines on CLDR names."
    line = parser("python -m examples.cldr_names", about, quick="fewer strings and seeds, about 1 minute")
    line.add_argument("--seeds", type=positive, help="runs of each method (default 3, with --quick 2)")
    line.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for results (%(default)s)")
    return line.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run the whole demo and write its results."""
    start_torch(args.threads)
    from rich.console import Console

    from ..common.progress import Meter
    from .data import load
    from .experiment import FULL, QUICK, Experiment, work
    from .report import save_csv, save_html, show
    from .timing import preflight

    config = QUICK if args.quick else FULL
    if args.seeds is not None:
        config = replace(config, seeds=args.seeds)
    try:
        preflight()
    except RuntimeError as error:
        sys.exit(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print("Reading CLDR names ...")
    data = load(max_strings=config.max_strings)
    rows = {"train": data.train, "validation": data.validation, **data.tests}
    sizes = ", ".join(f"{len(part)} {name}" for name, part in rows.items())
    console.print(f"{len(data.classes)} languages; rows: {sizes}", highlight=False)
    with Meter(console, work(data, config)) as meter:
        results = Experiment(data, config, meter).run()
    paths = [*save_csv(args.out, results), save_html(args.out, results, data, config)]
    show(console, results)
    console.print("Written: " + ", ".join(str(path) for path in paths), soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    args = parse(argv)
    return guarded(lambda: run(args), _NEEDED, args.out)


if __name__ == "__main__":
    sys.exit(main())
