"""Options and constants in the form that the compiled modules take, for both C++ backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from ..options import RowOptions, WClip
from ..rows.call import Rows
from ..rows.layout import dense

_REDUCTION_CODES = {"none": 0, "sum": 1, "mean": 2}


class Kernels(NamedTuple):
    """The values of a call that depend on the options alone."""

    state: Callable[..., Any]
    gradient: Callable[..., Any]
    terms: Any  # the module's own type
    ignore_index: int
    unlabeled_index: int
    reduction: int
    scalar: bool  # the loss is one number


@functools.lru_cache(maxsize=256)
def kernels(module: ModuleType, options: RowOptions) -> Kernels:
    """The values for a compiled module, `_native` or `_cuda`."""
    return Kernels(
        state=module.row_state,
        gradient=module.row_gradient,
        terms=packed_options(module, options),
        ignore_index=options.ignore_index,
        unlabeled_index=options.ignore_index if options.unlabeled_index is None else options.unlabeled_index,
        reduction=_REDUCTION_CODES[options.reduction],
        scalar=options.reduction != "none",
    )


def packed_options(module: ModuleType, options: RowOptions) -> Any:
    """The terms in the compiled module's own type: csrc/row/terms/term.h."""
    clip = options.calibration
    return module.Terms(
        [(p.term.kind, c, *p.term.parameters) for p, c in zip(options.pieces, options.coefficients)],
        isinstance(clip, WClip),
        clip.budget if isinstance(clip, WClip) else 0.0,
        clip.margin if isinstance(clip, WClip) else 1.0,
        options.sums,
        options.teacher_temperature or 0.0,
        options.leaving,
    )


def copied(rows: Rows) -> Rows:
    """The same rows in a layout that the kernels can address."""
    if rows.target is None:
        return rows._replace(logits=dense(rows.logits, "logits"))
    return rows._replace(logits=dense(rows.logits, "student_logits"), target=dense(rows.target, "teacher_logits"))
