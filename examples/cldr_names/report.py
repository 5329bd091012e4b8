"""The results as a terminal table, CSV files and a self-contained HTML page."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path

import babel
import torch
from rich.console import Console

from ..common.data import PARTS, Dataset
from ..common.figures import bar_chart, mean_and_spread, reliability_diagrams
from ..common.files import whole_file
from ..common.metrics import Scores
from ..common.report import cells, measure_table, save_page
from .conclusion import MEASURES, PAIRS, compare, conclude
from .experiment import Config, Results
from .methods import METHODS, STUDENTS, TEACHERS
from .timing import Timing

_MARKS = {"better": "▲", "worse": "▼", "same": " ", "unknown": " "}


def timing_lines(timing: Timing) -> list[str]:
    """Say what the loss costs in a student's step."""
    lines = [
        f"Student step on {timing.batch} x {timing.classes} logits, threads: {timing.threads}, median of "
        f"{timing.steps} steps taken in turns; both losses and gradients agree."
    ]
    for name, took in (("cudfast native", timing.native), ("plain PyTorch", timing.eager)):
        share = 100 * took.loss_ms / took.step_ms
        lines.append(f"{name}: loss {took.loss_ms:.2f} ms of a step of {took.step_ms:.2f} ms ({share:.0f}%)")
    loss, step = timing.eager.loss_ms / timing.native.loss_ms, timing.eager.step_ms / timing.native.step_ms
    return [*lines, f"plain PyTorch / native: loss {loss:.2f}, whole step {step:.2f}"]


def show(console: Console, results: Results) -> None:
    """Print the results, the differences, the cost of the loss and the conclusion."""
    table = measure_table("Results: mean±standard deviation over seeds", "Method", MEASURES)
    for part in PARTS:
        table.add_row(f"[bold]{part}[/bold]")
        for method in METHODS:
            last = method in (TEACHERS[-1], STUDENTS[-1])
            table.add_row(method.name, *cells(results.scores[method.name][part], MEASURES), end_section=last)
    console.print(table)
    table = measure_table("Differences by seed; ▲ better, ▼ worse by more than their deviation", "Methods", MEASURES)
    for part in PARTS:
        table.add_row(f"[bold]{part}[/bold]")
        for one, other in PAIRS:
            found = compare(results.scores, one, other, part)
            texts = [f"{d} {_MARKS[d.verdict]}" for d in found]
            table.add_row(f"{one} - {other}", *texts, end_section=(one, other) == PAIRS[-1])
    console.print(table)
    for line in [*timing_lines(results.timing), "", *conclude(results.scores)]:
        console.print(line, highlight=False)


def save_csv(folder: Path, results: Results) -> list[Path]:
    """Write the table as results.csv and its single runs as per_seed.csv."""
    table, runs = folder / "results.csv", folder / "per_seed.csv"
    entries = [(m.name, part, results.scores[m.name][part]) for m in METHODS for part in PARTS]
    with whole_file(table) as file:
        writer = csv.writer(file)
        writer.writerow(["method", "part", "seeds", *(f"{n}_{what}" for n in MEASURES for what in ("mean", "sd"))])
        for name, part, scores in entries:
            values = [x for n in MEASURES for x in mean_and_spread([getattr(s, n) for s in scores])]
            writer.writerow([name, part, len(scores), *(f"{x:.6f}" for x in values)])
    with whole_file(runs) as file:
        writer = csv.writer(file)
        writer.writerow(["method", "part", "seed", *(field.name for field in fields(Scores))])
        for name, part, scores in entries:
            for seed, single in enumerate(scores, start=1):
                writer.writerow([name, part, seed, *(f"{x:.6f}" for x in asdict(single).values())])
    return [table, runs]


def save_html(folder: Path, results: Results, data: Dataset, config: Config) -> Path:
    """Write report.html, which needs no other file."""
    pictures = {
        "bars": bar_chart(results.scores, PARTS, rule=len(TEACHERS)),
        "teachers": reliability_diagrams(results.bins, [method.name for method in TEACHERS], PARTS),
        "students": reliability_diagrams(results.bins, [method.name for method in STUDENTS], PARTS),
    }
    return save_page(
        folder / "report.html",
        Path(__file__).with_name("report.html.j2"),
        pictures,
        teachers=TEACHERS,
        students=STUDENTS,
        measures=MEASURES.values(),
        parts=PARTS,
        cells={m.name: {part: cells(results.scores[m.name][part], MEASURES) for part in PARTS} for m in METHODS},
        differences={part: {pair: compare(results.scores, *pair, part) for pair in PAIRS} for part in PARTS},
        choices=results.choices,
        timing=timing_lines(results.timing),
        conclusion=conclude(results.scores),
        data=data,
        ceilings={part: data.tests[part].ceiling() for part in PARTS},
        config=config,
        versions={"babel": babel.__version__, "torch": torch.__version__},
    )
