"""Sentences that state what the numbers of a run say, whichever way they fall."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.data import PARTS
from ..common.methods import CE_STUDENT, CE_TEACHER, CUD, DUS_TEACHER, EXACT, KD, KD_CLIP, KD_DUS
from ..common.metrics import MEASURES as ALL_MEASURES
from ..common.metrics import Scores

MEASURES = {name: ALL_MEASURES[name] for name in ("accuracy", "nll", "ece", "brier", "aurc")}
"""What the demo shows; its CSV of single runs has the others, too."""

PAIRS = (
    (CUD.name, KD.name),
    (KD_DUS.name, KD.name),
    (KD_CLIP.name, KD.name),
    (CUD.name, CE_STUDENT.name),
    (EXACT.name, CUD.name),
    (DUS_TEACHER.name, CE_TEACHER.name),
)
AllScores = dict[str, dict[str, list[Scores]]]
"""[method][part]: one entry per seed."""


@dataclass(frozen=True)
class Difference:
    """One method minus another by a measure: mean and standard deviation over seeds (None with one seed)."""

    measure: str
    mean: float
    spread: float | None

    @property
    def verdict(self) -> str:
        """Return better or worse if the mean exceeds the spread, else same; unknown with one seed."""
        if self.spread is None:
            return "unknown"
        if abs(self.mean) <= self.spread:
            return "same"
        return "better" if self.mean * MEASURES[self.measure].gain > 0 else "worse"

    def __str__(self) -> str:
        shown = MEASURES[self.measure]
        text = shown.text(self.mean, "+")
        return text if self.spread is None else f"{text}±{shown.text(self.spread)}"


def difference(one: Sequence[Scores], other: Sequence[Scores], measure: str) -> Difference:
    """Compare two methods; entry i of both comes from the same seed."""
    pairs = [getattr(a, measure) - getattr(b, measure) for a, b in zip(one, other, strict=True)]
    return Difference(measure, statistics.fmean(pairs), statistics.stdev(pairs) if len(pairs) > 1 else None)


def compare(scores: AllScores, one: str, other: str, part: str) -> list[Difference]:
    """Return ``one`` minus ``other`` by every measure."""
    return [difference(scores[one][part], scores[other][part], measure) for measure in MEASURES]


def accuracy_sentence(found: Difference, part: str) -> str:
    """Say whether CUD's accuracy differs from KD's by more than the spread."""
    meaning = {
        "better": "a gain that exceeds the spread over seeds",
        "worse": "a loss that exceeds the spread over seeds",
        "same": "which does not exceed the spread over seeds",
        "unknown": "from one seed, so the spread is unknown and nothing follows",
    }[found.verdict]
    return f"CUD minus KD, accuracy {part}: {found}{MEASURES['accuracy'].unit}, {meaning}."


def headline(found: dict[str, list[Difference]]) -> str:
    """Say by which measures CUD beats KD, loses or neither; ``found`` is CUD minus KD by part."""
    verdicts = {difference.verdict for part in found.values() for difference in part}
    if "unknown" in verdicts:
        return "One seed has no spread: this run cannot say whether CUD helps over KD."
    if verdicts == {"same"}:
        return "CUD does not help over KD on this task: no measure differs by more than the spread over seeds."
    start = "CUD does not help over KD on this task."
    if "better" in verdicts:
        start = "CUD helps over KD by some measures" + (" and hurts by others." if "worse" in verdicts else ".")
    return " ".join([start, *(f"{part.capitalize()}: {_by_verdict(found[part])}." for part in found)])


def _by_verdict(differences: list[Difference]) -> str:
    texts = []
    for verdict in ("better", "worse", "same"):
        names = [MEASURES[d.measure].title.split()[0] for d in differences if d.verdict == verdict]
        if names:
            texts.append(f"{verdict} {', '.join(names)}")
    return "; ".join(texts)


def conclude(scores: AllScores) -> list[str]:
    """Return the headline on CUD against KD, then a sentence on accuracy for each part."""
    found = {part: compare(scores, CUD.name, KD.name, part) for part in PARTS}
    return [headline(found), *(accuracy_sentence(found[part][0], part) for part in PARTS)]
