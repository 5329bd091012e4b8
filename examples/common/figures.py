"""The report's pictures as SVG text: reliability diagrams and a bar chart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .metrics import MEASURES, Scores

# Of the Okabe-Ito palette, told apart in every common form of colour blindness and in print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73")
_GREY = "#777777"
_BAR_PANELS = (
    ("accuracy", "Accuracy (%)\nmore is better", 100),
    ("nll", "NLL (nats)\nless is better", 1),
    ("ece", "ECE (%)\nless is better", 100),
)
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "cudfast",  # the same numbers give the same file
}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the latter is 0 with one seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def bar_chart(scores: dict[str, dict[str, list[Scores]]], parts: Sequence[str], rule: int) -> str:
    """Accuracy, NLL and ECE of each method in up to 3 parts, with the spread over seeds; a line after ``rule`` rows."""
    names = list(scores)
    rows = np.arange(len(names), dtype=float)
    height = 0.8 / len(parts)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 0.55 * len(names)))
        panels = figure.subplots(1, len(_BAR_PANELS), sharey=True)
        for axes, (measure, label, factor) in zip(panels, _BAR_PANELS, strict=True):
            for number, (part, colour) in enumerate(zip(parts, _COLOURS)):
                values = [mean_and_spread([factor * getattr(s, measure) for s in scores[n][part]]) for n in names]
                means, spreads = zip(*values, strict=True)
                axes.barh(
                    rows + (number - (len(parts) - 1) / 2) * height,
                    means,
                    0.95 * height,
                    xerr=spreads,
                    error_kw={"elinewidth": 1.2, "capsize": 2.5},
                    color=colour,
                    label=part,
                )
            axes.set_xlabel(label)
            axes.axhline(rule - 0.5, color=_GREY, linewidth=0.8)
        panels[0].set_yticks(rows, names)
        panels[0].invert_yaxis()
        figure.tight_layout(rect=(0, 0, 1, 0.93))
        return _finish(figure, panels[0])


def interval_chart(
    intervals: dict[str, dict[str, dict[str, tuple[float, float, float]]]], measures: Sequence[str]
) -> str:
    """[method][part][measure]: a difference and the ends of its interval, one panel per measure."""
    names = list(intervals)
    rows = np.arange(len(names), dtype=float)
    parts = list(intervals[names[0]])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 0.5 * len(names) + 1))
        panels = figure.subplots(1, len(measures), sharey=True)
        for axes, measure in zip(panels, measures, strict=True):
            shown = MEASURES[measure]
            for number, (part, colour) in enumerate(zip(parts, _COLOURS)):
                found = shown.factor * np.array([intervals[name][part][measure] for name in names])
                middle, low, high = found.T
                y = rows + 0.25 * (number - (len(parts) - 1) / 2)
                axes.hlines(y, low, high, color=colour, linewidth=2)
                axes.plot(middle, y, "o", color=colour, markersize=4, label=part)
            axes.axvline(0, color=_GREY, linewidth=0.8)
            axes.set_xlabel(f"{shown.title}\n{'more' if shown.gain > 0 else 'less'} is better")
        panels[0].set_yticks(rows, names)
        panels[0].invert_yaxis()
        figure.tight_layout(rect=(0, 0, 1, 0.9))
        return _finish(figure, panels[0])


def reliability_diagrams(
    bins: dict[str, dict[str, NDArray[np.float64]]], names: Sequence[str], parts: Sequence[str]
) -> str:
    """Accuracy against confidence per bin, one panel per method; a marker grows with its bin's rows."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2 * len(names) + 0.6, 3.1))
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            axes.plot([0, 100], [0, 100], color=_GREY, linewidth=1, linestyle="--", label="calibrated")
            for part, marker, colour in zip(parts, "os^", _COLOURS):
                rows, confidence, correct = bins[name][part]
                used = rows > 0
                x, y = (100 * total[used] / rows[used] for total in (confidence, correct))
                axes.plot(x, y, color=colour, linewidth=1.3)
                area = 6 + 200 * rows[used] / rows.sum()
                axes.scatter(x, y, area, color=colour, marker=marker, label=part, zorder=3, clip_on=False)
            axes.set_title(name, fontsize=11)
            axes.set_xlabel("Confidence (%)")
            axes.set(xlim=(0, 100), ylim=(0, 100), xticks=(0, 50, 100), yticks=(0, 50, 100))
            axes.set_aspect("equal")
        panels[0].set_ylabel("Accuracy (%)")
        figure.tight_layout(rect=(0, 0, 1, 0.9))
        return _finish(figure, panels[0])


def _finish(figure: Figure, labelled: Axes) -> str:
    """Add one legend on top, with the labels of one panel, and return the SVG."""
    handles, labels = labelled.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([36])
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    return file.getvalue()
