"""What both reports are made of: cells, tables on a terminal, the HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich import box
from rich.table import Table

from .figures import mean_and_spread
from .files import whole_file
from .metrics import Measure, Scores


def cells(scores: Sequence[Scores], measures: Mapping[str, Measure]) -> list[str]:
    """Mean ± spread over seeds of every measure, as text."""
    texts = []
    for name, shown in measures.items():
        mean, spread = mean_and_spread([getattr(s, name) for s in scores])
        texts.append(shown.text(mean) + (f"±{shown.text(spread)}" if len(scores) > 1 else ""))
    return texts


def measure_table(title: str, first: str, measures: Mapping[str, Measure]) -> Table:
    """Return an empty table with a column for each measure."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    table.add_column(first, no_wrap=True)
    for shown in measures.values():
        table.add_column(shown.title, justify="right")
    return table


def breakable(text: str) -> Markup:
    """Let a browser break a line before ±, so that tables fit into narrow windows."""
    return Markup("<wbr>±").join(text.split("±"))


def save_page(path: Path, template: Path, pictures: Mapping[str, str], **values: Any) -> Path:
    """Write an HTML page that needs no other file; ``pictures`` are SVG texts, by the name the template calls them."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    coded = {name: base64.b64encode(svg.encode()).decode() for name, svg in pictures.items()}
    with whole_file(path) as file:
        file.write(environment.get_template(template.name).render(pictures=coded, **values))
    return path
