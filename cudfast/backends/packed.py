"""Options and constants in the form that the compiled modules take, for both C++ backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from ..options import CUDOptions, DUSOptions, WClip
from ..rows.call import Rows
from ..rows.layout import dense

_REDUCTION_CODES = {"none": 0, "sum": 1, "mean": 2}


class Kernels(NamedTuple):
    """The values of a call that depend on the options alone."""

    state: Callable[..., Any]
    gradient: Callable[..., Any]
    options: Any  # the module's own type
    ignore_index: int
    unlabeled_index: int
    reduction: int
    scalar: bool  # the loss is one number
    indices: bool  # the state has a top-1
    logits: str  # the caller's name of the logits


@functools.lru_cache(maxsize=256)
def kernels(module: ModuleType, options: CUDOptions | DUSOptions) -> Kernels:
    """The values for a compiled module, `_native` or `_cuda`."""
    student = isinstance(options, CUDOptions)
    return Kernels(
        state=module.student_state if student else module.teacher_state,
        gradient=module.student_gradient if student else module.teacher_gradient,
        options=packed_options(module, options),
        ignore_index=options.ignore_index,
        unlabeled_index=options.ignore_index if options.unlabeled_index is None else options.unlabeled_index,
        reduction=_REDUCTION_CODES[options.reduction],
        scalar=options.reduction != "none",
        indices=student,
        logits="student_logits" if student else "logits",
    )


def packed_options(module: ModuleType, options: CUDOptions | DUSOptions) -> Any:
    """Options in the compiled module's own type: csrc/row/terms.h."""
    if isinstance(options, CUDOptions):
        clip = options.calibration
        return module.StudentOptions(
            options.kd_weight,
            options.ce_weight,
            isinstance(clip, WClip),
            clip.budget if isinstance(clip, WClip) else 0.0,
            clip.margin if isinstance(clip, WClip) else 1.0,
        )
    return module.TeacherOptions(
        options.ce_weight,
        options.focal_weight,
        options.entropy_weight,
        options.gamma,
        options.gate_threshold,
        options.gate_scale,
        options.gate_power,
        options.differentiate_gate,
    )


def copied(rows: Rows, logits_name: str) -> Rows:
    """The same rows in a layout that the kernels can address."""
    target = None if rows.target is None else dense(rows.target, "teacher_logits")
    return rows._replace(logits=dense(rows.logits, logits_name), target=target)
