"""Compares two runs: what became slower, beyond noise.

Runs differ in time or machine, so a time is first divided by that of the floor (a plain PyTorch call that moves the
same bytes) in the same rounds. These ratios of medians are compared; the interval is computed by resampling the rounds
of all four medians (bootstrap).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from .result import Figures, Result

SAMPLES = 2000
CONFIDENCE = 0.95
SLACK = 1.05
"""Difference between runs of the same code because of addresses and other processes, which resampling cannot show."""


class Change(NamedTuple):
    """Change of one contestant: new time over old time."""

    what: str
    contestant: str
    ratio: float  # 2: takes twice as long as before, both relative to the floor
    low: float  # of the confidence interval
    high: float

    @property
    def verdict(self) -> str:
        """Slower or faster, if the whole interval exceeds the difference of two runs of the same code; else empty."""
        return "slower" if self.low > SLACK else "faster" if self.high < 1 / SLACK else ""


def read(path: Path) -> list[Result]:
    """The races in a JSON of `python -m cudfast bench --json` or of pytest-benchmark.

    Raises:
        ValueError: the file is neither.
    """
    found: Any = json.loads(path.read_text())
    if not isinstance(found, dict) or not ("races" in found or "benchmarks" in found):
        raise ValueError(f"{path}: expected a JSON of `python -m cudfast bench --json` or `make bench`")
    races = found["races"] if "races" in found else [b["extra_info"].get("race") for b in found["benchmarks"]]
    return [Result.from_json(race) for race in races if race]


def medians(figures: Figures, random: numpy.random.Generator) -> NDArray[numpy.float64]:
    """(SAMPLES,) medians of rounds drawn with replacement."""
    seconds = numpy.asarray(figures.seconds)
    found: NDArray[numpy.float64] = numpy.median(random.choice(seconds, (SAMPLES, len(seconds))), axis=1)
    return found


def compare(old: Iterable[Result], new: Iterable[Result]) -> list[Change]:
    """The changes of all contestants that both runs have, without the floors."""
    before = {race.key: race for race in old}
    random = numpy.random.default_rng(0)
    found = []
    for race in new:
        then = before.get(race.key)
        if then is None or then.floor != race.floor:
            continue
        floor = medians(race.contestants[race.floor], random) / medians(then.contestants[then.floor], random)
        ends = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
        for name, figures in race.contestants.items():
            was = then.contestants.get(name)
            if was is None or name == race.floor:
                continue
            low, high = numpy.quantile(medians(figures, random) / medians(was, random) / floor, ends)
            found.append(Change(race.key, name, figures.over_floor / was.over_floor, float(low), float(high)))
    return found
