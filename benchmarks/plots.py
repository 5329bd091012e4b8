"""The pictures of docs/benchmarks.md. Every function draws one figure from results and writes one SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from cudfast.bench.result import Result

matplotlib.rcParams.update({"svg.hashsalt": "cudfast", "svg.fonttype": "none", "font.size": 9, "axes.axisbelow": True})

OURS = ("given gradient", "in place", "fresh gradient", 'save="state"')
FLOORS = ("torch.add", "torch.neg")


def save(figure: Any, path: Path) -> str:
    """Writes the figure; returns the line of markdown that shows it."""
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return path.name


def style(name: str) -> dict[str, Any]:
    """Ours in solid blue and green, floors dashed in black, yardsticks dotted in grey, peers in warm colours."""
    if name in FLOORS:
        return {"color": "black", "linestyle": "--", "marker": ""}
    if name in ("F.cross_entropy", "torch.softmax"):
        return {"color": "grey", "linestyle": ":", "marker": "x" if name == "torch.softmax" else "+"}
    if name in OURS:
        return {"color": ("tab:blue", "navy", "tab:green", "tab:cyan")[OURS.index(name)], "marker": "o"}
    warm = {"eager PyTorch": "tab:red", "torch.compile": "tab:orange", "MFT-style": "tab:brown"}
    return {"color": warm.get(name, "tab:pink" if "TRL" in name else "tab:purple"), "marker": "s"}


def classes_axis(axes: Axes, classes: Sequence[int]) -> None:
    """Logarithmic, with a tick at every V that was measured, named where there is room."""
    names, last = [], 0
    for v in classes:
        near = v < 2 * last
        names.append("" if near else f"{v / 1e6:.3g}M" if v >= 1e6 else f"{v / 1e3:.3g}k")
        last = last if near else v
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("V, classes")
    axes.grid(which="major", alpha=0.3)
    axes.set_xticks(classes, names, rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def against_classes(races: Sequence[Result], path: Path) -> str:
    """Time per logit and GB/s of every contestant, over V; the floor is drawn in."""
    races = sorted(races, key=lambda race: race.classes)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    names = dict.fromkeys(name for race in races for name in race.contestants)
    for name in names:
        seen = [(race, race.contestants[name]) for race in races if name in race.contestants]
        classes = [race.classes for race, _ in seen]
        left.plot(classes, [1e6 * f.median_ms / (r.rows * r.classes) for r, f in seen], label=name, ms=4, **style(name))
        right.plot(classes, [f.rate for _, f in seen], ms=4, **style(name))
    for axes in (left, right):
        classes_axis(axes, sorted({race.classes for race in races}))
    left.set_ylabel("nanoseconds per logit, N V of them")
    right.set_ylabel("GB/s of the bytes that must move")
    figure.legend(
        *left.get_legend_handles_labels(), loc="upper center", ncol=5, bbox_to_anchor=(0.5, 1.1), frameon=False
    )
    return save(figure, path)


def bars(rows: Mapping[str, float], path: Path, label: str, *, note: str = "{:.3g}", log: bool = False) -> str:
    """One horizontal bar a name, in order, its number beside it."""
    figure, axes = pyplot.subplots(figsize=(7, 0.32 * len(rows) + 0.8))
    names = list(rows)[::-1]
    colors = ["tab:blue" if name.split(",")[0] in OURS or name.startswith("fused") else "tab:orange" for name in names]
    drawn = axes.barh(names, [rows[name] for name in names], color=colors)
    axes.bar_label(drawn, [note.format(rows[name]) for name in names], padding=3)
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def speedups(race: Result, path: Path) -> str:
    """How many times as long the others take as a fresh gradient, which needs nothing given."""
    ours = race.contestants["fresh gradient"].median_ms
    others = {n: f.median_ms / ours for n, f in race.contestants.items() if n not in (*OURS, *FLOORS)}
    rows = {"fresh gradient": 1.0, **dict(sorted(others.items(), key=lambda pair: pair[1]))}
    title = f"time over CUDLoss with a fresh gradient, {race.shape} {race.dtype}"
    return bars(rows, path, title, note="{:.1f}x", log=True)


def scaling(race: Result, path: Path) -> str:
    """Time at constant N V over V."""
    lengths = {int(n[4:].replace(",", "")): f for n, f in race.contestants.items() if n.startswith("V = ")}
    figure, axes = pyplot.subplots(figsize=(6, 3.4))
    axes.plot(list(lengths), [f.median_ms for f in lengths.values()], label="given gradient", **style("given gradient"))
    axes.axhline(race.contestants[race.floor].median_ms, label=race.floor, color="black", linestyle="--")
    classes_axis(axes, list(lengths))
    axes.set_yscale("linear")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"ms for {race.rows * race.classes:,} logits")
    axes.legend(frameon=False)
    return save(figure, path)


def gpu(estimates: Sequence[Mapping[str, Any]], verified: Mapping[str, Any] | None, path: Path) -> str:
    """The model's GB/s of the fused student kernel, hatched, and the measured GB/s, solid, if there are any."""
    size = {"bf16": 2, "fp32": 4, "bfloat16": 2, "float32": 4}
    rows = [
        (f"{e['gpu']}, V = {e['classes']:,} (model)", 3 * size[e["dtype"]] / e["picoseconds"] * 1e3, "model")
        for e in estimates
        if e["kernel"] == "student, fused" and e["dtype"] == "bf16"
    ]
    if verified:
        device = str(verified["device"]).split(",")[0]
        rows += [
            (f"{device}, {t['shape']}, {t['name'].split(',')[0]} (measured)", t["gigabytes_per_second"], "measured")
            for t in verified["times"]
            if t["name"] == f"{t['backend']}, given gradient" and t["dtype"] == "bfloat16"
        ]
    figure, axes = pyplot.subplots(figsize=(7, 0.26 * len(rows) + 0.8))
    for name, rate, kind in reversed(rows):
        how: dict[str, Any] = {"color": "tab:green"}
        if kind == "model":
            how = {"color": "white", "edgecolor": "tab:blue", "hatch": "///"}
        axes.bar_label(axes.barh(name, rate, **how), [f"{rate:,.0f}"], padding=3)
    axes.set_xlabel("GB/s of two reads and one write of (N, V), bfloat16; hatched: a model, not a measurement")
    axes.margins(x=0.15)
    return save(figure, path)
