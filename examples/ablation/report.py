"""The results as tables on a terminal, one CSV file and one HTML page."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ..common.data import PARTS
from ..common.figures import bar_chart, interval_chart, mean_and_spread, reliability_diagrams
from ..common.files import whole_file
from ..common.methods import CUD
from ..common.metrics import MEASURES, Array, Outcome, Scores, reliability, score
from ..common.report import cells, measure_table, save_page
from ..common.search import Choice, Task
from .bootstrap import LEVEL, Interval, compare
from .tasks import BASELINE, METHODS, STUDENTS, TEACHERS, Config, thirds

RESAMPLES = 500


@dataclass(frozen=True)
class Findings:
    """``scores[method][part]``: one per seed; ``differences[part][method][measure]``: minus the baseline."""

    scores: dict[str, dict[str, list[Scores]]]
    bins: dict[str, dict[str, Array]]
    differences: dict[str, dict[str, dict[str, Interval]]]
    rows: dict[str, int]

    @property
    def parts(self) -> list[str]:
        """The two tests, then the thirds of the classes in distribution."""
        return list(self.differences)


def find(task: Task, outcomes: Mapping[str, Mapping[str, list[Outcome]]]) -> Findings:
    """Measure and compare ``outcomes[method][part]``, one per seed."""
    students = {m.name for m in STUDENTS}
    scores: dict[str, dict[str, list[Scores]]] = {name: {} for name in outcomes}
    differences, sizes = {}, {}
    tests = task.data.tests
    which = {part: (part, torch.ones(len(tests[part]), dtype=torch.bool)) for part in PARTS}
    which |= {name: (PARTS[0], classes[tests[PARTS[0]].label]) for name, classes in thirds(task.data).items()}
    for part, (test, chosen) in which.items():
        keep = chosen.numpy()
        if not keep.any():
            continue
        runs = {name: [rows.take(keep) for rows in found[test]] for name, found in outcomes.items()}
        for name, found in runs.items():
            scores[name][part] = [score(rows) for rows in found]
        compared = {name: found for name, found in runs.items() if name in students}
        differences[part] = compare(compared, BASELINE.name, tests[test].string.numpy()[keep], RESAMPLES)
        sizes[part] = int(keep.sum())
    bins = {
        name: {part: np.sum([reliability(rows) for rows in found[part]], axis=0) for part in PARTS}
        for name, found in outcomes.items()
    }
    return Findings(scores, bins, differences, sizes)


def interval_text(measure: str, found: Interval) -> str:
    """The difference and its interval, in the unit of the measure."""
    shown = MEASURES[measure]
    return f"{shown.text(found.mean, '+')} [{shown.text(found.low, '+')}, {shown.text(found.high, '+')}]"


def conclude(findings: Findings, seeds: int) -> list[str]:
    """What CUD's differences from the baseline are, part by part."""
    lines = []
    for part, differences in findings.differences.items():
        found = differences[CUD.name]
        better = [n for n, d in found.items() if d.excludes_zero and d.mean * MEASURES[n].gain > 0]
        worse = [n for n, d in found.items() if d.excludes_zero and d.mean * MEASURES[n].gain < 0]
        texts = [f"{word} in {', '.join(map(_short, ns))}" for word, ns in (("better", better), ("worse", worse)) if ns]
        lines.append(
            f"{part.capitalize()}: {CUD.name} minus {BASELINE.name} is {interval_text('accuracy', found['accuracy'])} "
            f"points of accuracy; {'; '.join(texts) or 'no interval excludes 0'}."
        )
    if seeds == 1:
        lines.append("One seed has no spread: the intervals know of other test strings, not of other seeds.")
    return lines


def _short(measure: str) -> str:
    return MEASURES[measure].title.removesuffix(" %").removesuffix(" nats")


def show(console: Console, findings: Findings, seeds: int) -> None:
    """Print the measures of every method, and what follows."""
    table = measure_table("Mean±standard deviation over seeds", "Method", MEASURES)
    for part in findings.parts:
        table.add_row(f"[bold]{part}[/bold], {findings.rows[part]} rows")
        for method in METHODS:
            last = method in (TEACHERS[-1], STUDENTS[-1])
            table.add_row(method.name, *cells(findings.scores[method.name][part], MEASURES), end_section=last)
    console.print(table)
    for line in conclude(findings, seeds):
        console.print(line, highlight=False)


def save_csv(folder: Path, findings: Findings) -> Path:
    """Write one line for each method and part: mean, deviation, difference from the baseline and its interval."""
    path = folder / "results.csv"
    ends = ("mean", "sd", "minus_kd", "low", "high")
    with whole_file(path) as file:
        writer = csv.writer(file)
        writer.writerow(["method", "part", "rows", "seeds", *(f"{n}_{end}" for n in MEASURES for end in ends)])
        for method in METHODS:
            for part, runs in findings.scores[method.name].items():
                values: list[str] = []
                for name in MEASURES:
                    values += [f"{x:.6f}" for x in mean_and_spread([getattr(s, name) for s in runs])]
                    found = findings.differences[part].get(method.name)
                    ends_of = (found[name].mean, found[name].low, found[name].high) if found else ()
                    values += [f"{x:.6f}" for x in ends_of] or [""] * 3
                writer.writerow([method.name, part, findings.rows[part], len(runs), *values])
    return path


def save_html(
    folder: Path, findings: Findings, task: Task, config: Config, choices: Mapping[str, Choice], seeds: int
) -> Path:
    """Write report.html, which needs no other file."""
    others = [method.name for method in STUDENTS if method is not BASELINE]
    differences = findings.differences
    intervals = {
        name: {
            part: {m: (d.mean, d.low, d.high) for m, d in differences[part][name].items()}
            for part in PARTS
        }
        for name in others
    }  # fmt: skip
    tail = [part for part in findings.parts if part not in PARTS]
    pictures = {
        "bars": bar_chart(findings.scores, PARTS, rule=len(TEACHERS)),
        "tail": bar_chart(findings.scores, tail, rule=len(TEACHERS)),
        "intervals": interval_chart(intervals, ("accuracy", "nll", "ece")),
        "reliability": reliability_diagrams(findings.bins, [m.name for m in (*TEACHERS, BASELINE, CUD)], PARTS),
    }
    return save_page(
        folder / "report.html",
        Path(__file__).with_name("report.html.j2"),
        pictures,
        data=task.data,
        config=config,
        seeds=seeds,
        level=LEVEL,
        resamples=RESAMPLES,
        baseline=BASELINE,
        methods=METHODS,
        teachers=TEACHERS,
        others=others,
        measures=MEASURES,
        parts=findings.parts,
        rows=findings.rows,
        cells={m.name: {p: cells(runs, MEASURES) for p, runs in findings.scores[m.name].items()} for m in METHODS},
        differences=differences,
        interval_text=interval_text,
        choices=choices,
        conclusion=conclude(findings, seeds),
        versions={"torch": torch.__version__},
    )
