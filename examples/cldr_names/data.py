"""CLDR display names from babel: string -> language, with currency names, never trained on, as the test under shift."""

from __future__ import annotations

from babel import localedata

from ..common.data import Dataset, build

SOURCES = ("territories", "languages", "scripts")
SHIFT_SOURCES = ("currency_names",)


def read_names(sources: tuple[str, ...]) -> dict[str, set[str]]:
    """Return the strings of each base language (a locale without territory or script) in CLDR."""
    names: dict[str, set[str]] = {}
    for code in sorted(c for c in localedata.locale_identifiers() if "_" not in c):
        # Inherited entries are copies of the parent's names, not names in this language.
        tables = localedata.load(code, merge_inherited=False)
        names[code] = {text for source in sources for text in tables.get(source, {}).values() if isinstance(text, str)}
    return names


def load(*, max_strings: int | None = None) -> Dataset:
    """Read CLDR from babel and build the data set of the demo."""
    return build(read_names(SOURCES), read_names(SHIFT_SOURCES), max_strings=max_strings)
