"""The launches of a call: block sizes, parts of long rows, and the arguments of the kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...options import RowOptions, WClip
from ...rows.call import Rows, State, columns_of, compute_dtype
from ...rows.layout import dense, row_count, row_layout
from ...rows.vectors import divisors_of
from ...terms.term import REVERSE, SQUARE, TEACHER_ENTROPY, UNIFORM
from ..tuning import tuned
from . import projected, row, search, student, teacher, terms
from .pieces import Sweep, count, scale_rows
from .settings import settings_of

_COUNT_BLOCK = 1024
_WARP = 32  # threads: on AMD, where a wave has 64, half as many


class Plan(NamedTuple):
    """How the columns of a row are divided."""

    block: int  # columns that one program processes at a time
    threads: int
    parts: int  # programs that share a row
    chunk: int  # columns of a part, a multiple of block
    stages: int = 0  # of the compiler's pipelines; 0 leaves them to it


def plan(
    n: int, classes: int, wide: bool, processors: int, *, whole: bool = False, tuning: Mapping[str, int] | None = None
) -> Plan:
    """8 columns a thread (16 bytes of bf16; of f64: 2), up to 256 threads.

    The plan depends on V's power of two, so that nothing is compiled again when N changes. Programs share a row if
    there are fewer rows than the GPU can process at once, as long as each has at least 4 blocks of it, unless rows must
    not be split. `tuning` overrides parts of the plan: see `cudfast.backends.tuning`.

    Example:
        >>> plan(8192, 32_000, wide=False, processors=132)
        Plan(block=2048, threads=256, parts=1, chunk=32768, stages=0)
        >>> plan(4, 1_000_000, wide=False, processors=132).parts
        98
        >>> plan(8192, 32_000, wide=False, processors=132, tuning={"block": 8192, "warps": 16})
        Plan(block=8192, threads=512, parts=1, chunk=32768, stages=0)
    """
    tuning = tuning or {}
    block = min(max(triton.next_power_of_2(classes), 256), tuning.get("block", 512 if wide else 2048))
    parts = 1
    if n < 2 * processors and not whole:
        parts = max(1, min(classes // (4 * block), triton.cdiv(4 * processors, max(n, 1))))
    chunk = triton.cdiv(triton.cdiv(classes, parts), block) * block
    threads = _WARP * tuning["warps"] if "warps" in tuning else min(block // (2 if wide else 8), 1024)
    return Plan(block, threads, triton.cdiv(classes, chunk), chunk, tuning.get("stages", 0))


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a device; a small number in the interpreter."""
    if device.type == "cpu":
        return 4
    found = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(found, "multi_processor_count", 0) or getattr(found, "gpu_eu_count", 64))


@functools.lru_cache(maxsize=16)
def lanes(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data centre GPUs."""
    if device.type == "cpu":
        return 32
    return int(getattr(torch.get_device_module(device).get_device_properties(device), "warp_size", 32))


# For kernels that use more than 128 registers a thread without a limit: two programs on a multiprocessor.
TWO_PROGRAMS: dict[str, dict[str, object]] = {"cuda": {"maxnreg": 128}, "hip": {"waves_per_eu": 4}}


def compiler(device: torch.device) -> str:
    """Triton's name of the compiler backend of a device."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type


def warps(plan: Plan, device: torch.device) -> int:
    """Number of warps of a program."""
    return max(1, plan.threads // lanes(device))


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which launches use this device and its current stream."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


# Groups of a kernel's arguments. The numbers in them specialise kernels, as all others do: if they are 1 or multiples
# of 16. The number of rows is none of them.


EVERY = (1 << 31) - 1  # rows that a grid can have; no multiple of 16, which would be another kernel


class Matrix(NamedTuple):
    """Rows of logits, in a layout that `dense` has accepted: see `row_layout`."""

    pointer: Tensor
    inner: int
    outer: int
    stride: int

    @classmethod
    def of(cls, logits: Tensor) -> Matrix:
        found = row_layout(logits)
        assert found is not None
        inner, outer, stride = found
        if inner == 1 or inner >= row_count(logits):  # one stride for all rows, whatever their number
            return cls(logits, EVERY, 0, outer if inner == 1 else stride)
        return cls(logits, inner, outer, stride)


class Given(NamedTuple):
    """What a call gives for its rows, besides their logits, and the numbers of its loss."""

    labels: Tensor | None
    weight: Tensor | None
    temperatures: Tensor | None
    settings: Tensor
    coefficients: Tensor | None  # of the terms, (T, N) or (T, 1)
    coefficient_step: int  # from row to row: 1 or 0


class Scales(NamedTuple):
    divisors: Tensor
    upstream: Tensor | None  # (N,) or ()
    step: int  # from row to row


class Results(NamedTuple):
    """What kernels read from and write to for every row."""

    loss: Tensor | None
    sums: Tensor | None
    top1: Tensor
    parts: Tensor | None


class Sets(NamedTuple):
    """Bounds of the rows and the classes that they are about. Without near_offsets, N(y) is the label, near[row]."""

    bounds: Tensor
    near_offsets: Tensor | None
    near: Tensor
    wrong_offsets: Tensor | None
    wrong: Tensor


class Columns(NamedTuple):
    classes: int  # V
    padded: int  # columns of the gradient
    chunk: int


def scale(gradient: Tensor, upstream: Tensor) -> None:
    """gradient (..., V) times upstream () or (N,), in place."""
    wide, columns = gradient.dtype == torch.float64, gradient.shape[-1]
    n = row_count(gradient)
    cut = plan(n, columns, wide, processors(gradient.device))
    scale_rows[(n, cut.parts)](
        Matrix.of(gradient), upstream, columns, cut.chunk, int(upstream.dim() > 0),
        R=tl.float64 if wide else tl.float32, BLOCK=cut.block,
        num_warps=warps(cut, gradient.device), enable_fp_fusion=True,
    )  # fmt: skip


_NAMES = {
    TEACHER_ENTROPY: "the teacher's entropy",
    SQUARE: "the Brier score",
    REVERSE: "reverse KL",
    UNIFORM: "label smoothing",
}


def refuse_unknown(rows: Rows, options: RowOptions) -> None:
    """Raises ValueError for what these kernels do not compute."""
    missing = [name for sums, name in _NAMES.items() if options.sums & sums]
    if options.teacher_temperature is not None and rows.target is not None:
        missing.append("a teacher_temperature")
    if missing:
        raise ValueError(
            f"backend 'triton' does not compute {' and '.join(missing)}; pass backend='reference', which does on any "
            "device"
        )


class Call(NamedTuple):
    """The arguments that all kernels of a call share."""

    rows: Rows
    options: RowOptions
    settings: Tensor
    plan: Plan
    wide: bool

    @classmethod
    def of(cls, rows: Rows, options: RowOptions) -> Call:
        refuse_unknown(rows, options)
        name = "logits" if rows.target is None else "student_logits"
        target = None if rows.target is None else dense(rows.target, "teacher_logits")
        rows = rows._replace(logits=dense(rows.logits, name), target=target)
        wide = compute_dtype(rows) == torch.float64
        device = rows.logits.device
        units, whole = processors(device), rows.constraints is not None
        loss = "projected" if whole else "student" if target is not None else "teacher"
        tuning = tuned("triton", device, loss, rows.logits.element_size(), rows.classes)
        cut = plan(rows.n, rows.classes, wide, units, whole=whole, tuning=tuning)
        return cls(rows, options, settings_of(options, device), cut, wide)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.wide else torch.float32

    def new_state(self) -> State:
        """Memory for a packed state."""
        with_top1 = self.rows.target is not None
        device, n = self.rows.logits.device, self.rows.n
        columns = columns_of(self.rows, self.options)
        return State(
            torch.empty(n, len(columns), dtype=self.dtype, device=device),
            torch.empty(n if with_top1 else 0, dtype=torch.int64, device=device),
            self.divisors(),
        )

    def divisors(self) -> Tensor:
        """(2,) f64 on the device: divisors of all terms and of those of the label. One launch counts the rows."""
        rows = self.rows
        if rows.num_items is not None or self.options.reduction != "mean":
            return divisors_of(rows, self.options)
        found = torch.empty(2, dtype=torch.float64, device=rows.logits.device)
        count[(1,)](
            rows.labels,
            rows.weight,
            found,
            self.settings,
            rows.n,
            BLOCK=_COUNT_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return found

    def _launch(self, kernel: Any, parts: int, *arguments: object, **constants: object) -> None:
        plan = self.plan
        if plan.stages:
            constants["num_stages"] = plan.stages
        kernel[(self.rows.n, parts)](
            *arguments,
            R=tl.float64 if self.wide else tl.float32,
            BLOCK=plan.block,
            num_warps=warps(plan, self.rows.logits.device),
            enable_fp_fusion=True,
            **constants,
        )

    def sweep(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        parts: Tensor | None = None,
        gradient: Tensor | None = None,
        upstream: Tensor | None = None,
        keep: bool = True,
        statistics: bool = False,
        fold: bool = False,
    ) -> None:
        """One launch of the row kernel. fold: from the logits; with `parts`: from their sums; else from `state`."""
        rows = self.rows
        merge = parts is not None
        g = rows.logits if gradient is None else gradient
        scales = Scales(state.divisors, upstream, 0 if upstream is None or upstream.dim() == 0 else 1)
        results = Results(loss, state.sums if keep else None, state.top1, parts)
        columns = Columns(rows.classes, g.shape[-1], self.plan.chunk)
        flags = {"SWEEP": Sweep(fold, merge, gradient is not None), "KINDS": self.options.kinds}
        programs = 1 if fold or merge else self.plan.parts
        logits, to = Matrix.of(rows.logits), Matrix.of(g)
        if rows.target is None:
            self._launch(teacher.teacher_rows, programs, logits, to, self.given, scales, results, columns, **flags)
        elif rows.constraints is not None:
            results = results._replace(sums=state.sums)
            self._projected(to, scales, results, columns, fold, gradient is not None)
        else:
            self._launch(
                student.student_rows, programs,
                logits, Matrix.of(rows.target), to, self.given, scales, results, columns, float(rows.scalar),
                P=self.power, ONES=self.ones(statistics), CLIP=self.clip, **flags,
            )  # fmt: skip

    def _projected(
        self, to: Matrix, scales: Scales, results: Results, columns: Columns, fold: bool, writes: bool
    ) -> None:
        """The launches of `sweep` for a target with constraints: one, or more if they bound the entropy."""
        rows = self.rows
        assert rows.constraints is not None
        assert rows.target is not None
        assert results.sums is not None
        logits, target = Matrix.of(rows.logits), Matrix.of(rows.target)
        top1, entropy = rows.constraints.top1, rows.constraints.entropy and fold
        # Larger programs have a processor to themselves.
        registers = TWO_PROGRAMS.get(compiler(rows.logits.device), {}) if self.plan.threads <= 256 else {}
        sets = self.constraints(results.top1)

        def launch(fold: bool, again: bool, write: bool) -> None:
            self._launch(
                projected.projected_rows, 1,
                logits, target, to, self.given, scales, results, sets, columns, float(rows.scalar),
                P=self.power, ONES=self.ones(False), KINDS=self.options.kinds,
                SWEEP=projected.ProjectedSweep(fold, again, write, entropy, top1), **registers,
            )  # fmt: skip

        launch(fold, False, writes and not entropy)
        if entropy:
            work = torch.empty(rows.n, search.WORK.value, dtype=torch.float64, device=rows.logits.device)
            self._launch(
                search.temper_rows, 1, target, self.given, sets, results, work, rows.classes,
                TOP1=top1, STUDENT=results.sums.shape[1] - search.COLUMNS.value,
            )  # fmt: skip
            launch(False, True, False)
            if writes:
                launch(False, False, True)

    def constraints(self, top1: Tensor) -> Sets:
        rows, c = self.rows, self.rows.constraints
        assert c is not None
        some = top1 if rows.labels is None else rows.labels
        near, wrong = ((None, some) if sets is None else (sets.offsets, sets.indices) for sets in (c.near, c.wrong))
        return Sets(c.bounds, *near, *wrong)

    @property
    def given(self) -> Given:
        rows = self.rows
        step = 0 if rows.coefficients is None or rows.coefficients.shape[1] == 1 else 1
        return Given(rows.labels, rows.weight, rows.temperature, self.settings, rows.coefficients, step)

    @property
    def power(self) -> int:
        """The temperature when it is 1, 2 or 4 in every row, else 0."""
        return int(self.rows.scalar) if self.rows.temperature is None and self.rows.scalar in (1, 2, 4) else 0

    @property
    def clip(self) -> int:
        """Whether the target is clipped, and whether the state then has a column for m_q: see `row.LEAVES`."""
        if not (self.options.distils and isinstance(self.options.calibration, WClip)):
            return 0
        packed = columns_of(self.rows, self.options)
        return int((row.LEAVES if "m_q" in packed else row.STAYS).value)

    def ones(self, statistics: bool) -> int:
        """Which sums at temperature 1 are needed: see `row.student_fold`."""
        found = row.S_ONE.value if any(kind != terms.FORWARD_KL.value for kind in self.options.kinds) else 0
        found |= self.options.sums & row.E_S.value
        return found | row.S_ONE.value | row.Z_ONE.value if statistics else found

    def fold_parts(self, statistics: bool) -> Tensor:
        """States of the parts of every row."""
        rows, plan = self.rows, self.plan
        width = (teacher if rows.target is None else student).PART.value
        found = torch.empty(rows.n, plan.parts, width, dtype=torch.float64, device=rows.logits.device)
        logits, columns = Matrix.of(rows.logits), Columns(rows.classes, rows.classes, plan.chunk)
        if rows.target is None:
            self._launch(teacher.teacher_parts, plan.parts, logits, self.given, found, columns)
        else:
            self._launch(
                student.student_parts, plan.parts,
                logits, Matrix.of(rows.target), self.given, found, columns, float(rows.scalar),
                P=self.power, ONES=self.ones(statistics),
            )  # fmt: skip
        return found
