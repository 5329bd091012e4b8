"""Strings with their classes, split honestly into train, validation, test and a test under shift.

One row is a pair (string, class). A string such as "Tonga" belongs to many languages, so the split is by string:
independent of its classes, a string is in exactly one of train, validation and test. The strings of the test under
shift are from another source and are never used for training.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ngrams import Bags, encode

PARTS = ("in distribution", "under shift")

Names = Mapping[str, set[str]]
"""The strings of each class."""


@dataclass(frozen=True)
class Split:
    """Rows of one part of the data: row i is string ``string[i]`` with class ``label[i]``.

    ``string`` and ``label`` are int64 [N]; ``string`` indexes ``bags``, which holds each string once, and ``vectors``
    [S, D], what an encoder makes of the strings (None without one).
    """

    bags: Bags
    string: Tensor
    label: Tensor
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the row numbers in random order, ``size`` at a time, without an incomplete last piece."""
        order = torch.randperm(len(self), generator=generator)
        pieces = order.split(size)
        yield from (piece for piece in pieces if len(piece) == size or len(pieces) == 1)

    def ceiling(self) -> tuple[float, float]:
        """Accuracy and NLL (nats) of a predictor that has all classes of every string of this part."""
        classes = torch.bincount(self.string)[self.string].double()
        return float((1 / classes).mean()), float(classes.log().mean())


@dataclass(frozen=True)
class Dataset:
    """Training, validation and the test sets of PARTS; ``classes[v]`` is the name of class v."""

    classes: list[str]
    train: Split
    validation: Split
    tests: dict[str, Split]


def split_strings(
    names: Names, shares: tuple[float, float, float], seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Divide the strings into train, validation and test, each class in these shares.

    A string of several classes counts for the one with the fewest strings, so that small classes are represented in
    every part.
    """
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares must be three positive numbers that add up to 1, not {shares}")
    rng = np.random.default_rng(seed)
    owned: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    for code in sorted(names, key=lambda c: (len(names[c]), c)):
        owned[code] = sorted(names[code] - seen)
        seen |= names[code]
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for strings in owned.values():
        shuffled = [strings[i] for i in rng.permutation(len(strings))]
        first = round(shares[0] * len(strings))
        second = round((shares[0] + shares[1]) * len(strings))
        for part, piece in zip(parts, (shuffled[:first], shuffled[first:second], shuffled[second:]), strict=True):
            part.extend(piece)
    return parts


def make_split(
    strings: list[str], names: Names, classes: list[str], embed: Callable[[list[str]], Tensor] | None = None
) -> Split:
    """Return one row for each class of each string; ``embed`` turns S strings into vectors [S, D]."""
    position = {text: i for i, text in enumerate(strings)}
    pairs = sorted(
        (position[text], label) for label, code in enumerate(classes) for text in names[code] if text in position
    )
    rows = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return Split(encode(strings), rows[:, 0].contiguous(), rows[:, 1].contiguous(), embed(strings) if embed else None)


def capped(names: Names, most: float | None, seed: int) -> Names:
    """Draw at most ``most`` strings of each class; below 1 it is the share that is drawn, at least one string."""
    if most is None:
        return names
    rng = np.random.default_rng(seed)
    kept = {}
    for code in sorted(names):
        text = sorted(names[code])
        size = math.ceil(most * len(text)) if most < 1 else int(most)
        kept[code] = {text[i] for i in rng.permutation(len(text))[:size]}
    return kept


def build(
    names: Names,
    shift_names: Names,
    *,
    min_strings: int = 50,
    max_strings: float | None = None,
    shares: tuple[float, float, float] = (0.6, 0.15, 0.25),
    seed: int = 0,
    embed: Callable[[list[str]], Tensor] | None = None,
) -> Dataset:
    """Build the data set from the classes with at least ``min_strings`` strings.

    ``max_strings`` caps the strings of one class (drawn at random), or is the share of them to keep; see `capped`.
    """
    classes = [code for code in sorted(names) if len(names[code]) >= min_strings]
    if len(classes) < 2:
        raise ValueError(f"need 2 classes with {min_strings} strings, found {len(classes)}: lower min_strings")
    chosen = capped({code: names[code] for code in classes}, max_strings, seed)
    parts = split_strings(chosen, shares, seed)
    known = set().union(*chosen.values())
    novel = {code: shift_names.get(code, set()) - known for code in classes}
    shift = sorted(set().union(*novel.values()))
    train, validation, test = (make_split(part, chosen, classes, embed) for part in parts)
    shifted = make_split(shift, novel, classes, embed)
    return Dataset(classes, train, validation, dict(zip(PARTS, (test, shifted), strict=True)))
