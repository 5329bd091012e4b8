"""The size of a tile, the rows and classes whose logits are in memory at a time, for a budget of bytes.

Tiles of whole rows are preferred: they need four products, and the loss kernel reads a tile once. They have as many
rows as fit, since every chunk of rows reads the weights again and adds to their gradient: on the machine of
docs/linear.md (2 cores, f32, D = 512, V = 65,536) the four products of a row take 2.20 ms in chunks of 32 rows, 1.38 of
64, 1.06 of 128, 1.07 of 256, 0.91 of 512 and 0.86 in one of 1,024. If fewer than FEW rows fit, tiles of some classes
and of many rows are cheaper, although the logits are then computed twice, once for the row states and once for the
gradient: six products.
"""

from __future__ import annotations

from typing import NamedTuple

FEW = 32  # least rows in a chunk of whole rows: below, 4 products are slower than 6 with many rows, because of memory
OTHERS = 64  # 1 / 64 of the budget is reserved for internal buffers of the products: 2 of 256 MiB were measured
NARROW = 2048  # least classes of a tile: below, products of any number of rows are slower


class Cost(NamedTuple):
    """The memory that a tile needs, in bytes."""

    logit: int  # per row and class
    row: int  # per row
    fixed: int  # independent of the tile
    carried: int  # for sums that are passed from one chunk of rows to the next


class Tile(NamedTuple):
    rows: int
    classes: int


def _even(count: int, most: int) -> int:
    """Size of equal parts of `count`, at most `most`: a multiple of 16, which is fast for products, if that fits."""
    most = max(1, min(count, most))
    parts = -(-count // most)
    size = -(-count // parts)
    return min(-(-size // 16) * 16, most)


def choose(rows: int, classes: int, cost: Cost, budget: int, *, whole: bool) -> Tile:
    """The tile for `rows` x `classes` logits. whole: rows must not be split.

    Raises:
        ValueError: the smallest tile does not fit; the message states the budget that is needed.
    """

    room = budget - budget // OTHERS

    def fitting(columns: int, carried: int) -> int:
        return (room - cost.fixed - carried) // (columns * cost.logit + cost.row)

    rows = max(1, rows)
    if fitting(classes, 0) >= rows:
        return Tile(rows, classes)
    fit = fitting(classes, cost.carried)
    if fit >= FEW or (whole and fit >= 1):
        return Tile(_even(rows, fit), classes)
    if not whole:
        columns = (room - cost.fixed - rows * cost.row) // (rows * cost.logit) if cost.logit else classes
        if columns >= NARROW:
            return Tile(rows, _even(classes, columns))
        narrow = min(classes, NARROW)
        fit = fitting(narrow, cost.carried)
        if fit >= 1:
            return Tile(_even(rows, fit), narrow)
    least_columns = classes if whole else min(classes, NARROW)
    least = cost.fixed + min(
        least_columns * cost.logit + cost.row + (cost.carried if rows > 1 else 0),
        rows * (least_columns * cost.logit + cost.row),
    )
    least += (least - 1) // (OTHERS - 1)
    why = " (calibration=Projection(...) needs whole rows)" if whole and classes > NARROW else ""
    raise ValueError(
        f"memory_budget={budget:,} bytes are too few for one row of {least_columns:,} logits and its buffers{why}: "
        f"the smallest budget that works here is {least:,} bytes"
    )
