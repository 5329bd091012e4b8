"""docs/benchmarks.md and its pictures, from the JSON files of `make bench`.

python -m benchmarks.report bench_results/*.json [--compare OLD.json] [--gpu gpu_verify/lines.jsonl]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cudfast.bench.command import show_changes
from cudfast.bench.compare import compare, read
from cudfast.bench.result import Result

from . import plots
from .gpu.report import measured
from .gpu.report import read as read_run
from .peers import WHAT

PICTURES = "benchmarks"  # folder beside benchmarks.md
ABOUT = """\
All times are for one forward and backward pass with labels and τ = 2. Before it is timed, every variant of cudfast is
compared with float64 on the same inputs. All rows of a table were timed in turns, in the same minutes; times are
medians of the rounds. GB/s count the bytes that every implementation has to move: two reads and one write of (N, V)
for a distillation loss, one read and one write for a loss without teacher. torch.add, or torch.neg for one matrix,
moves these bytes with one operation per element, in the same rounds; "of torch.add" is the fraction of its GB/s. Peak
memory is measured beyond the inputs; it includes the gradient unless its memory is given. Unused memory of the library
and of the process was returned to the system before each measurement.

Variants of cudfast:

- fresh gradient: the default; the call allocates the memory of the gradient
- given gradient: the gradient is written to memory that the caller passes as `grad_out`
- in place: the gradient overwrites the logits (`inplace=True`)
- save="state": the gradient is computed in backward instead of forward
"""


class Found:
    """Everything that the JSON files hold."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.races: dict[str, Result] = {}
        self.info: dict[str, Any] = {}
        self.machine: dict[str, str] = {}
        self.dates: list[str] = []
        for path in paths:
            content = json.loads(path.read_text())
            self.races.update({race.key: race for race in read(path)})  # a later file replaces an earlier one's race
            if "benchmarks" in content:
                self.machine.update(content["machine_info"].get("cudfast", {}))
                self.dates.append(content["datetime"][:10])
            for benchmark in content.get("benchmarks", []):
                self.info.update({k: v for k, v in benchmark["extra_info"].items() if k != "race"})

    def of(self, title: str, dtype: str = "float32") -> list[Result]:
        """The races of that title, short rows first."""
        found = [race for race in self.races.values() if race.title == title and race.dtype == dtype]
        return sorted(found, key=lambda race: (race.classes, race.rows))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown; the first column to the left, numbers to the right."""
    line = "|" + "---|" + "---:|" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", line, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: float) -> str:
    """Three digits or more, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def times(race: Result) -> list[str]:
    """One race: a line a contestant."""
    ours = next(iter(race.contestants))
    rows = []
    for name, f in race.contestants.items():
        memory = "–" if f.peak_bytes is None else number(f.peak_bytes / 2**20)
        cells = [number(f.median_ms), number(f.rate), f"{f.of_floor:.0%}", number(f.over_ours), memory, str(f.rounds)]
        rows.append([name, *cells])
    rows += [[name, why, "", "", "", "", ""] for name, why in race.absent.items()]
    who = f": {race.used_by}" if race.used_by else ""
    header = ["", "median ms", f"G{race.unit}/s", f"of {race.floor}", f"/ {ours}", "peak MiB", "rounds"]
    return [f"**{race.shape} {race.dtype}**{who}", "", *table(header, rows)]


def races(title: str, found: Sequence[Result]) -> list[str]:
    """A section, if there is anything for it."""
    return [f"## {title}", "", *(line for race in found for line in times(race))] if found else []


def picture(name: str, what: str) -> list[str]:
    return [f"![{what}]({PICTURES}/{name})", ""]


def against_pytorch(found: Found, folder: Path) -> list[str]:
    """CUDLoss: pictures first, numbers after them."""
    sweep = found.of("CUDLoss")
    if not sweep:
        return []
    lines = ["## CUDLoss against V", ""]
    if len(sweep) > 1:
        large = [race for race in sweep if not race.shape.small]
        lines += picture(plots.against_classes(large, folder / "classes.svg"), "Time per logit and GB/s over V")
    for race in sweep:
        if race.classes in (77, 32_000):
            name = plots.speedups(race, folder / f"speedup-{race.classes}.svg")
            lines += picture(name, f"Time over CUDLoss with a fresh gradient, {race.shape}")
    lines += [line for race in sweep for line in times(race)]
    return lines + races("16 bits", [r for dtype in ("bfloat16", "float16") for r in found.of("CUDLoss", dtype)])


def memory(found: Found, folder: Path) -> list[str]:
    if not (cases := found.info.get("memory")):
        return []
    rows = {name: m["peak"] for name, m in cases["cases"].items()}
    unit = f"N V elements of float32 ({cases['unit'] / 1e6:.4g} MB)"
    name = plots.bars(rows, folder / "memory.svg", f"peak memory beyond the inputs, in {unit}", note="{:.2f}")
    body = [
        [n, f"{m['peak']:.2f}", f"{m['between']:.2f}" if "between" in m else "–"] for n, m in cases["cases"].items()
    ]
    lines = ["## Memory", "", *picture(name, "Peak memory"), f"In {unit}, measured as resident memory:", ""]
    return lines + table(["", "peak", "between forward and backward"], body)


def scaling(found: Found, folder: Path) -> list[str]:
    lines = []
    for race in found.races.values():
        if race.title.startswith("CUDLoss, given gradient, N V"):
            drawn = picture(plots.scaling(race, folder / "scaling.svg"), "Time at constant N V over V")
            lines += [*drawn, f"**{race.title}**", "", *brief(race)]
    for race in found.of("CUDLoss, threads"):
        rows = {name: f.median_ms for name, f in race.contestants.items()}
        drawn = picture(plots.bars(rows, folder / "threads.svg", f"ms, {race.shape}"), "One and two threads")
        lines += [*drawn, f"**Threads, {race.shape} {race.dtype}**", "", *brief(race)]
    return ["## Scaling", "", *lines] if lines else []


def brief(race: Result) -> list[str]:
    """Times of what shares its inputs with the rest."""
    rows = [[name, number(f.median_ms), f"{f.over_floor:.2f}"] for name, f in race.contestants.items()]
    return table(["", "median ms", f"/ {race.floor}"], rows)


def linear(found: Found) -> list[str]:
    lines = races("From hidden states: FusedLinearCUDLoss", found.of("FusedLinearCUDLoss"))
    lines += races("From hidden states, cross-entropy alone", found.of("FusedLinearCUDLoss(kd_weight=0)"))
    if held := found.info.get("linear_memory"):
        shown = {**{name: number(most) for name, most in held["MiB"].items()}, **held["absent"]}
        lines += [
            f"Peak memory beyond inputs and gradients, {held['sizes']}, MiB:",
            "",
            *table(["", "MiB"], shown.items()),
        ]
    return lines


def gpu(found: Found, verified: Mapping[str, Any] | None, folder: Path) -> list[str]:
    """The model, labelled as one, and beside it what a GPU gave."""
    estimates = found.info.get("estimates", [])
    if not estimates:
        return []
    lines = ["## GPUs: a model, not a measurement", ""]
    lines += ["Calculated from machine code and data sheets (docs/gpu.md); bfloat16, per element of (N, V)."]
    lines += ["" if verified else "No results of `make gpu-verify` yet: nothing here has been timed on a GPU.", ""]
    lines += picture(plots.gpu(estimates, verified, folder / "gpu.svg"), "GB/s of the model")
    rows = []
    for e in estimates:
        if e["dtype"] == "bf16":
            counts = [f"{e[f'{what}_per_element']:.3g}" for what in ("bytes", "instructions", "exponentials")]
            rows.append(
                [
                    e["gpu"],
                    e["kernel"],
                    f"{e['classes']:,}",
                    *counts,
                    f"{e['picoseconds']:.2f}",
                    e["bound"],
                    f"{e['share']:.0%}",
                ]
            )
    lines += table(
        ["GPU", "kernel", "V", "bytes", "instructions", "exponentials", "ps", "bound by", "of torch.add"], rows
    )
    if verified:
        lines += [f"**Measured on {verified['device']}** (`make gpu-verify`)", ""]
        measured = []
        for t in verified["times"]:
            rates = [
                f"{t['milliseconds']:.3f}",
                f"{t['gigabytes_per_second']:.0f}",
                f"{t['of_floor']:.0%} of {t['floor']}",
            ]
            measured.append([t["shape"], t["dtype"], t["name"], *rates])
        lines += table(["N x V", "dtype", "way", "ms", "GB/s", "share"], measured)
    return lines


def goals(found: Found) -> list[str]:
    """What was asked of this library, and what came out."""
    rows = []
    for race in found.races.values():
        for g in race.goals:
            required = f"{'≤' if g.at_most else '≥'} {g.required:g}"
            aim = "–" if g.aim is None else f"{g.aim:g}"
            what = [f"{race.title}, {race.shape} {race.dtype}", f"{g.over} / {g.under}"]
            rows.append([*what, f"{g.ratio:.2f}", required, aim, "yes" if g.met else "**no**"])
    return ["## Goals", "", *table(["", "ratio", "measured", "required", "aim", "met"], rows)] if rows else []


def document(
    found: Found, folder: Path, verified: Mapping[str, Any] | None = None, *, quick: bool = False, note: str = ""
) -> str:
    """The text of benchmarks.md; its pictures go into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = ", ".join(f"{key} {value}" for key, value in found.machine.items() if value)
    short = ["A short run (`make bench QUICK=1`): few rounds, few shapes.", ""] if quick else []
    lines = [
        "# Benchmarks",
        "",
        "`make bench` writes this page. `python -m cudfast bench` makes the main measurements without the source tree.",
        f"Measured {max(found.dates, default='')} on: {facts}.",
        *([note] if note else []),
        "",
        *short,
        ABOUT,
        "What the other implementations compute:",
        "",
        *(f"- {name}: {what}" for name, what in WHAT.items()),
        "",
        *against_pytorch(found, folder),
        *races("Cross-entropy alone: CUDLoss(kd_weight=0)", found.of("CUDLoss(kd_weight=0)")),
        *races("DUSLoss", [*found.of("DUSLoss"), *found.of("DUSLoss", "bfloat16")]),
        *memory(found, folder),
        *scaling(found, folder),
        *races("The exact projection", found.of("CUDLoss, given gradient")),
        *linear(found),
        *gpu(found, verified, folder),
        *goals(found),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "json", type=Path, nargs="+", help="files that `make bench` wrote; later ones replace earlier ones"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of benchmarks.md")
    parser.add_argument(
        "--gpu", type=Path, metavar="LINES.jsonl", help="of `make gpu-verify`; left out where it is not there"
    )
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what became slower; exit with 1 if any")
    parser.add_argument("--quick", action="store_true", help="say that this was a short run")
    parser.add_argument("--note", default="", help="a sentence about the machine")
    asked = parser.parse_args(arguments)
    found = Found(asked.json)
    verified = measured(read_run(asked.gpu)) if asked.gpu and asked.gpu.exists() else None
    page = asked.out / "benchmarks.md"
    page.write_text(document(found, asked.out / PICTURES, verified, quick=asked.quick, note=asked.note))
    print(f"Written: {page}, {asked.out / PICTURES}")
    if not asked.compare:
        return 0
    changes = compare(read(asked.compare), found.races.values())
    show_changes(changes, Console(width=200))
    return 1 if any(c.verdict == "slower" for c in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
