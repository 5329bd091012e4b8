"""CLDR display names from babel as a string -> language data set with an honest split.

One row is a pair (string, language). A string such as "Tonga" belongs to many languages, so the split is by
string: whatever its languages, a string lies in exactly one of train, validation and test. Currency names are
never trained on and form a second test set under shift.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from babel import localedata
from torch import Tensor

from .ngrams import Bags, encode

SOURCES = ("territories", "languages", "scripts")
SHIFT_SOURCES = ("currency_names",)
PARTS = ("in distribution", "under shift")

Names = Mapping[str, set[str]]


@dataclass(frozen=True)
class Split:
    """Rows of one part of the data: row i is string ``string[i]`` with language ``label[i]``.

    ``string`` and ``label`` are int64 [N]; ``string`` indexes ``bags``, which holds each string once.
    """

    bags: Bags
    string: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield the row numbers in random order, ``size`` at a time, without an incomplete last piece."""
        order = torch.randperm(len(self), generator=generator)
        pieces = order.split(size)
        yield from (piece for piece in pieces if len(piece) == size or len(pieces) == 1)

    def ceiling(self) -> tuple[float, float]:
        """Accuracy and NLL (nats) of a predictor that knows every language of every string of this part."""
        languages = torch.bincount(self.string)[self.string].double()
        return float((1 / languages).mean()), float(languages.log().mean())


@dataclass(frozen=True)
class Dataset:
    """Training, validation and the test sets of PARTS; ``languages[v]`` is the CLDR code of class v."""

    languages: list[str]
    train: Split
    validation: Split
    tests: dict[str, Split]


def read_names(sources: tuple[str, ...]) -> dict[str, set[str]]:
    """Return the strings of each base language (a locale without territory or script) in CLDR."""
    names: dict[str, set[str]] = {}
    for code in sorted(c for c in localedata.locale_identifiers() if "_" not in c):
        # Inherited entries are copies of the parent's names, not names in this language.
        tables = localedata.load(code, merge_inherited=False)
        names[code] = {text for source in sources for text in tables.get(source, {}).values() if isinstance(text, str)}
    return names


def split_strings(
    names: Names, shares: tuple[float, float, float], seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Divide the strings into train, validation and test, each language in these shares.

    A string of several languages counts for the one with the fewest strings, so that small languages are
    represented in every part.
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


def make_split(strings: list[str], names: Names, languages: list[str]) -> Split:
    """Return one row for each language of each string."""
    position = {text: i for i, text in enumerate(strings)}
    pairs = sorted(
        (position[text], label) for label, code in enumerate(languages) for text in names[code] if text in position
    )
    rows = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return Split(encode(strings), rows[:, 0].contiguous(), rows[:, 1].contiguous())


def build(
    names: Names,
    shift_names: Names,
    *,
    min_strings: int = 50,
    max_strings: int | None = None,
    shares: tuple[float, float, float] = (0.6, 0.15, 0.25),
    seed: int = 0,
) -> Dataset:
    """Build the data set from languages with at least ``min_strings`` strings.

    ``max_strings`` caps the strings of one language (drawn at random), for quick runs.
    """
    languages = [code for code in sorted(names) if len(names[code]) >= min_strings]
    if len(languages) < 2:
        raise ValueError(f"need 2 languages with {min_strings} strings, found {len(languages)}: lower min_strings")
    kept = {code: sorted(names[code]) for code in languages}
    if max_strings is not None:
        rng = np.random.default_rng(seed)
        kept = {code: [text[i] for i in rng.permutation(len(text))[:max_strings]] for code, text in kept.items()}
    chosen = {code: set(text) for code, text in kept.items()}
    parts = split_strings(chosen, shares, seed)
    known = set().union(*chosen.values())
    novel = {code: shift_names.get(code, set()) - known for code in languages}
    shift = sorted(set().union(*novel.values()))
    train, validation, test = (make_split(part, chosen, languages) for part in parts)
    shifted = make_split(shift, novel, languages)
    return Dataset(languages, train, validation, dict(zip(PARTS, (test, shifted), strict=True)))


def load(*, max_strings: int | None = None) -> Dataset:
    """Read CLDR from babel and build the data set of the demo."""
    return build(read_names(SOURCES), read_names(SHIFT_SOURCES), max_strings=max_strings)
