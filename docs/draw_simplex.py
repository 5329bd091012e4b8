"""Draws docs/simplex.svg, the exact projection for three classes: python docs/draw_simplex.py"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from cudfast import Projection, calibrate

Points = NDArray[np.float64]

P = np.array([0.08, 0.86, 0.06])  # of y, k and the third class
MIN_NEAR, MAX_WRONG, FLOOR = 0.3, 0.58, 1.03
CORNERS = np.array([[0.5, math.sqrt(0.75)], [0.0, 0.0], [1.0, 0.0]])
GREY, BLUE, RED, GREEN = "#808890", "#3a86d8", "#d9534f", "#2f9e62"  # in between: for light and dark pages


def entropy(q: Points) -> Points:
    h: Points = -(q * np.log(np.maximum(q, 1e-300))).sum(-1)
    return h


def inside(q: Points) -> Points:
    """Positive within all three bounds."""
    h: Points = np.minimum(np.minimum(q[..., 0] - MIN_NEAR, MAX_WRONG - q[..., 1]), entropy(q) - FLOOR)
    return h


def outline(f: Callable[[Points], Points], centre: Points) -> Points:
    """Where f becomes 0 on rays from the centre, (rays, 3)."""
    angle = np.linspace(0, 2 * np.pi, 181)[:, None]
    u, v = np.array([2.0, -1.0, -1.0]) / math.sqrt(6), np.array([0.0, -1.0, 1.0]) / math.sqrt(2)
    ray = np.cos(angle) * u + np.sin(angle) * v
    low, high = np.zeros_like(angle), np.full_like(angle, 1.0)
    for _ in range(40):
        middle = (low + high) / 2
        q = centre + middle * ray
        good = ((q > 0).all(-1) & (f(np.maximum(q, 0)) > 0))[:, None]
        low, high = np.where(good, middle, low), np.where(good, high, middle)
    return centre + low * ray


def target(floor: float | None) -> Points:
    projection = Projection(min_near_mass=MIN_NEAR, max_wrong_mass=MAX_WRONG, min_entropy=floor)
    return calibrate(torch.from_numpy(np.log(P)), torch.tensor(0), projection).numpy()


def draw(path: Path) -> None:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "simplex", "font.family": "sans-serif"})
    fig, ax = plt.subplots(figsize=(6.2, 5.0))
    ax.set_aspect("equal")
    ax.axis("off")

    def line(q: Points, **style: Any) -> None:
        ax.plot(*(q @ CORNERS).T, **style)

    def note(q: Points, text: str, dx: float, dy: float, color: str, ha: str = "left") -> None:
        ax.annotate(text, q @ CORNERS, (dx, dy), textcoords="offset points", color=color, ha=ha, va="center", size=11)

    masses, q = target(None), target(FLOOR)
    ax.fill(*(outline(inside, np.array([0.4, 0.3, 0.3])) @ CORNERS).T, color=GREEN, alpha=0.22, lw=0)
    line(np.eye(3)[[0, 1, 2, 0]], color=GREY, lw=1.2)
    a, e = MIN_NEAR, MAX_WRONG
    line(np.array([[a, 1 - a, 0], [a, 0, 1 - a]]), color=BLUE, lw=1.5)
    line(np.array([[1 - e, e, 0], [0, e, 1 - e]]), color=RED, lw=1.5)
    level = outline(lambda x: entropy(x) - FLOOR, np.full(3, 1 / 3))
    line(level, color=GREEN, lw=1.5)
    for point, face in ((P, GREY), (masses, "none"), (q, GREEN)):
        ax.plot(*(point @ CORNERS), "o", ms=7, mfc=face, mec=GREEN if point is q else GREY, mew=1.5)

    for corner, text, dy in zip(np.eye(3), ("label y, N = {y}", "top-1 k, W = {k}", "third class"), (12, -13, -13)):
        note(corner, text, 0, dy, GREY, "center")
    note(P, "p", 10, 0, GREY)
    note(masses, "m", -8, 10, GREY, "right")
    note(q, "q", 9, 10, GREEN)
    note(np.array([a, 0, 1 - a]), f"q(N) ≥ {a:g}", 8, 0, BLUE)
    note(np.array([1 - e, e, 0]), f"q(W) ≤ {e:g}", -8, 5, RED, "right")
    note(level[0], f"H(q) ≥ {FLOOR:g}", 0, 10, GREEN, "center")
    fig.savefig(path, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("simplex.svg"))
