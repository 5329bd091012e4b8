"""The settings of the losses: frozen, validated, hashable.

Options contain no tensors. A value that changes between calls (labels, weights, a temperature per row) is an argument
of the call; a value that defines the loss is a field here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from .rows.fields import TEMPERATURES, choice, flag, integer, number
from .targets.projection import Projection
from .terms import MOST, TERMS, CrossEntropy, Entropy, Focal, ForwardKL, Gate, Piece, Term, Weighted, pieces_of
from .terms.term import SQUARE, STUDENT_ENTROPY, TEACHER_ENTROPY

Reduction = Literal["none", "sum", "mean"]
Save = Literal["auto", "state", "gradient"]
BackendName = Literal["auto", "reference", "native", "triton", "cuda"]

# Values of rows that a call may ask for, with the sums that they read.
ROW_VALUES = {
    "student_entropy": STUDENT_ENTROPY,
    "teacher_entropy": TEACHER_ENTROPY,
    "lse": 0,
    "label_log_prob": 0,
    "brier": SQUARE,
}


@dataclass(frozen=True)
class WClip:
    """Wrong-mass clipping of the teacher, Eq. 4-8: mass moves from a wrong top-1 to the label.

    With p = softmax(teacher) at temperature 1, k its top-1 and y the label, a labelled row with k != y moves
    ``min(budget * p_k, margin * (p_k - p_y))`` from k to y. Every other class keeps its mass.

    Args:
        budget: largest share of the top-1's mass that may move, in [0, 1). 0 turns clipping off. Default 0.5 (paper).
        margin: largest share of the gap p_k - p_y that may move, in (0, 1]. Default 0.7 (paper).

    Raises:
        TypeError, ValueError: a field that is not a number in its range.

    Example:
        >>> WClip(budget=0.5, margin=0.7)
        WClip(budget=0.5, margin=0.7)
    """

    budget: float = 0.5
    margin: float = 0.7

    def __post_init__(self) -> None:
        number(self, "budget", 0, 1)
        if self.budget == 1:
            raise ValueError("WClip(budget=1): expected a finite number in [0, 1): the top-1 keeps some of its mass")
        number(self, "margin", 0, 1, open_low=True)


class _Text:
    """Options as JSON, the form in which they are passed to a torch.library op. Projections are left out: they contain
    tensors.

    The text is made in the constructor: no release of torch can trace its making, and all can trace an attribute. It is
    not a field, so comparisons, hashes and reprs leave it out; a copy makes its own.
    """

    text: ClassVar[str]

    @torch.compiler.disable(reason="options and losses are made outside of a function that is compiled")  # type: ignore[untyped-decorator]
    def _write(self) -> None:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        text = json.dumps({"kind": type(self).__name__, **fields}, default=_plain)
        object.__setattr__(self, "text", text)
        self._derive()

    def _derive(self) -> None:
        """Sets the attributes that follow from the fields."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._write()


def _plain(field: object) -> object:
    """The JSON form of a field's value that JSON cannot represent."""
    if isinstance(field, WClip):
        return dataclasses.asdict(field)
    if isinstance(field, Term):
        return {"type": type(field).__name__, **{f.name: getattr(field, f.name) for f in dataclasses.fields(field)}}
    if isinstance(field, Gate):
        return dataclasses.asdict(field)
    return None if isinstance(field, Projection) else str(field)


@dataclass(frozen=True, kw_only=True)
class LossOptions(_Text):
    """Fields that both losses share.

    Args:
        ignore_index: rows with this label are excluded; their gradient is exactly 0. Default -100 (PyTorch).
        unlabeled_index: marks rows as unlabelled: they contribute to the distillation term only. None: no such label.
            Default None; -1 in CUDOptions.
        reduction: "none", "sum" or "mean" ("batchmean" is an alias of "mean"). Default "mean".
        num_classes: number of leading columns that are real classes, for logits padded to unequal widths. None: all.
        save: what is saved between forward and backward. "state": the row state, at most 200 bytes a row, and the
            gradient is computed in backward. "gradient": the gradient itself, computed in forward while the row is in
            cache; the inputs are saved, too, for a second backward. "auto": "gradient" for scalar reductions, "state"
            for reduction="none" and for float16 logits.
        inplace: write the gradient over the logits, which contain it after backward; no (N, V) memory is allocated.
        backend: "auto", "native" (C++ on the CPU), "triton" (GPUs), "cuda" (NVIDIA GPUs,
            opt-in: CUDA C++) or "reference" (PyTorch, any device).
        check_finite: raise ValueError for the first row whose loss is NaN, at the cost of one read of the row states.
    """

    ignore_index: int = -100
    unlabeled_index: int | None = None
    reduction: Reduction = "mean"
    num_classes: int | None = None
    save: Save = "auto"
    inplace: bool = False
    backend: BackendName = "auto"
    check_finite: bool = False

    def __post_init__(self) -> None:
        if str(self.reduction) == "batchmean":
            object.__setattr__(self, "reduction", "mean")
        choice(self, "reduction", get_args(Reduction))
        choice(self, "save", get_args(Save))
        choice(self, "backend", get_args(BackendName))
        integer(self, "ignore_index")
        if self.unlabeled_index is not None:
            integer(self, "unlabeled_index")
            if self.unlabeled_index == self.ignore_index:
                raise ValueError(
                    f"unlabeled_index and ignore_index are both {self.ignore_index}: expected two different values; "
                    "pass unlabeled_index=None where no label means that a row has none"
                )
        if self.num_classes is not None:
            integer(self, "num_classes")
            if self.num_classes < 1:
                raise ValueError(f"num_classes={self.num_classes}: expected at least 1, or None for every column")
        flag(self, "inplace")
        flag(self, "check_finite")


@dataclass(frozen=True, kw_only=True)
class RowOptions(LossOptions):
    """What a backend is given: the terms of a loss, and how its rows are treated.

    Args:
        terms: the terms of a loss, each with its name and its coefficient.
        temperature: tau of the distillation terms.
        teacher_temperature: the teacher's own temperature; None: tau.
        calibration: `WClip`, `Projection` or None.
        smooths: the rows of a call have label smoothing of their own.
        values: names of `ROW_VALUES` that a call asks for besides its terms.

    Other fields: see `LossOptions`.

    Example:
        >>> CUDOptions().rows.kinds
        (0, 1)
    """

    terms: tuple[Weighted, ...]
    temperature: float = 1.0
    teacher_temperature: float | None = None
    calibration: WClip | Projection | None = None
    smooths: bool = False
    values: tuple[str, ...] = ()

    pieces: ClassVar[tuple[Piece, ...]]  # what the kernels evaluate
    kinds: ClassVar[tuple[int, ...]]  # of the pieces
    coefficients: ClassVar[tuple[float, ...]]  # of the pieces
    distils: ClassVar[bool]  # some term needs a teacher
    whole: ClassVar[bool]  # some term counts in rows without a label
    sums: ClassVar[int]  # that some term or value reads: a mask, see terms/term.py
    leaving: ClassVar[float]  # W-Clip needs care at teacher temperatures below it; 0 without W-Clip
    smoothed: ClassVar[RowOptions | None]  # the options of a call with smoothing of its own, if that is possible

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.values:
            if name not in ROW_VALUES:
                raise ValueError(f"values={self.values!r}: expected names of {', '.join(ROW_VALUES)}")
        self._write()
        if "teacher_entropy" in self.values and not self.distils:
            raise ValueError("values: teacher_entropy in a loss without a distillation term, which reads no teacher")

    def _derive(self) -> None:
        pieces = pieces_of(self.terms, self.smooths)
        of = [piece.term for piece in pieces]
        sums = 0
        for needed in (*(term.sums for term in of), *(ROW_VALUES[name] for name in self.values)):
            sums |= needed
        clip = self.calibration
        clips = isinstance(clip, WClip) and clip.budget > 0 and any(term.distils for term in of)
        object.__setattr__(self, "pieces", pieces)
        object.__setattr__(self, "kinds", tuple(term.kind for term in of))
        object.__setattr__(self, "coefficients", tuple(piece.coefficient * piece.factor for piece in pieces))
        object.__setattr__(self, "distils", any(term.distils for term in of))
        object.__setattr__(self, "whole", any(not term.needs_label for term in of))
        object.__setattr__(self, "sums", sums)
        # Where the top-1 keeps less than 1/8 of its tempered mass: (1 - budget)^(1 / tau) < 1/8.
        object.__setattr__(self, "leaving", -math.log1p(-clip.budget) / math.log(8) if clips else 0.0)
        two = sum(isinstance(weighted.term, CrossEntropy) for weighted in self.terms)
        fits = not self.smooths and two > 0 and len(self.terms) + two <= MOST
        object.__setattr__(self, "smoothed", dataclasses.replace(self, smooths=True) if fits else None)


def _with_terms(options: LossOptions, *terms: tuple[float, Term], **fields: Any) -> RowOptions:
    """Options of rows with the terms whose coefficient is not 0."""
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(LossOptions)}
    weighted = tuple(Weighted(term.name or term.label, c, term) for c, term in terms if c != 0)
    return RowOptions(terms=weighted, **shared, **fields)


@dataclass(frozen=True, kw_only=True)
class CUDOptions(LossOptions):
    """Student loss, Eq. 9: ``kd_weight * tau^2 * KL(q^(tau) || p_S^(tau)) + ce_weight * CE``.

    Args:
        temperature: tau in [1e-4, 1e4]. Default 2.0. 1, 2 and 4 are the fastest: two exponentials per element instead
            of three.
        teacher_temperature: the teacher's own temperature in [1e-4, 1e4]; None: tau. Default None.
        kd_weight: weight of the distillation term, >= 0. Default 0.8 (paper).
        ce_weight: weight of the cross-entropy term at temperature 1, >= 0. Default 0.2 (paper).
        label_smoothing: of the cross-entropy term, in [0, 1]; see `CrossEntropy`. Default 0.
        calibration: `WClip`, `Projection`, or None for plain distillation. Default ``WClip(budget=0.5, margin=0.7)``
            (paper).

    Other fields: see `LossOptions`.

    Raises:
        TypeError, ValueError: a field out of range; the error names it and the expected values.

    Example:
        >>> CUDOptions(temperature=4.0).kd_weight
        0.8
    """

    temperature: float = 2.0
    kd_weight: float = 0.8
    ce_weight: float = 0.2
    calibration: WClip | Projection | None = WClip()
    teacher_temperature: float | None = None
    label_smoothing: float = 0.0
    unlabeled_index: int | None = -1

    rows: ClassVar[RowOptions]
    alone: ClassVar[RowOptions]  # without a teacher: cross-entropy

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "temperature", *TEMPERATURES)
        if self.teacher_temperature is not None:
            number(self, "teacher_temperature", *TEMPERATURES)
        number(self, "kd_weight", 0)
        number(self, "ce_weight", 0)
        number(self, "label_smoothing", 0, 1)
        if not (self.calibration is None or isinstance(self.calibration, (WClip, Projection))):
            raise TypeError(
                f"calibration={self.calibration!r}: expected WClip(budget, margin), Projection(...) or None"
            )
        self._write()

    def _derive(self) -> None:
        ce = (self.ce_weight, CrossEntropy(self.label_smoothing))
        kd = (self.kd_weight, ForwardKL(self.temperature, self.teacher_temperature))
        of_kd = {name: getattr(self, name) for name in ("temperature", "teacher_temperature", "calibration")}
        rows = _with_terms(self, kd, ce, **of_kd)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "alone", _with_terms(self, ce))


@dataclass(frozen=True, kw_only=True)
class DUSOptions(LossOptions):
    """Teacher loss, Eq. 3: ``ce_weight * CE + focal_weight * focal - entropy_weight * w * H(p)``.

    The gate ``w = 1{p_y < gate_threshold} + gate_scale * (1 - p_y)^gate_power`` rewards entropy in hard rows. The paper
    gives entropy_weight = 0.1, gamma = 10 and alpha = 1, and leaves the other values open. Their defaults here are
    ours: a step at one half and a linear ramp.

    Args:
        ce_weight: weight of cross-entropy, >= 0. Default 1.0 (ours).
        focal_weight: weight of ``-alpha_y (1 - p_y)^gamma log p_y``, >= 0. Default 1.0 (ours).
        entropy_weight: weight of the gated entropy, in units of nats, >= 0. Default 0.1 (paper).
        gamma: focal exponent, >= 0. Default 10.0 (paper).
        alpha: focal scale for all classes, > 0. Default 1.0 (paper). One value per class is an argument of the call.
        gate_threshold: the step is 1 for rows with p_y below it, in [0, 1]. Default 0.5 (ours).
        gate_scale: size of the ramp, >= 0. Default 1.0 (ours).
        gate_power: exponent of the ramp, >= 0. Default 1.0 (ours).
        differentiate_gate: let the gradient flow through the ramp (the step has none). Default False.

    Other fields: see `LossOptions`.

    Raises:
        TypeError, ValueError: a field out of range; the error names it and the expected values.

    Example:
        >>> DUSOptions(gamma=2.0).entropy_weight
        0.1
    """

    ce_weight: float = 1.0
    focal_weight: float = 1.0
    entropy_weight: float = 0.1
    gamma: float = 10.0
    alpha: float = 1.0
    gate_threshold: float = 0.5
    gate_scale: float = 1.0
    gate_power: float = 1.0
    differentiate_gate: bool = False

    rows: ClassVar[RowOptions]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ce_weight", "focal_weight", "entropy_weight", "gamma", "gate_scale", "gate_power"):
            number(self, name, 0)
        number(self, "alpha", 0, open_low=True)
        number(self, "gate_threshold", 0, 1)
        flag(self, "differentiate_gate")
        self._write()

    def _derive(self) -> None:
        gate = Gate(self.gate_threshold, self.gate_scale, self.gate_power, self.differentiate_gate)
        rows = _with_terms(
            self,
            (self.ce_weight, CrossEntropy()),
            (self.focal_weight, Focal(self.gamma, self.alpha)),
            (-self.entropy_weight, Entropy(gate)),
        )
        object.__setattr__(self, "rows", rows)

    def per_class(self, alpha: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The focal scale per class (V,) of a call under the name of its term, if there is that term."""
        return {Focal.label: alpha} if alpha is not None and self.focal_weight > 0 else {}


@dataclass(frozen=True, kw_only=True)
class LinearOptions(_Text):
    """The formula of logits from hidden states, ``softcap * tanh(scale * z / softcap)``, and its memory budget.

    z = hidden @ weight.T + bias; without a soft cap the logits are ``scale * z``.

    Args:
        memory_budget: bytes that a call may allocate besides the gradients that it returns, or "auto": 256 MiB. It
            determines the number of rows and classes of the logits that exist at a time. Default "auto".
        accumulate_dtype: dtype in which weight gradients are summed over chunks of rows if it is wider than the
            weight's own; float32, float64, or a 16-bit dtype to save that memory. Default float32.
        scale: factor of the (student) logits, > 0. Default 1.0 (Cohere's logit_scale).
        softcap: c of c * tanh(z / c), > 0; None: no cap. Default None (Gemma's final_logit_softcapping).
        teacher_scale, teacher_softcap: the same for the teacher's logits.

    Raises:
        TypeError, ValueError: a field out of range; the error names it and the expected values.

    Example:
        >>> LinearOptions(memory_budget=64 << 20, softcap=30.0).bytes
        67108864
    """

    memory_budget: int | Literal["auto"] = "auto"
    accumulate_dtype: torch.dtype = torch.float32
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.memory_budget != "auto":
            integer(self, "memory_budget")
            if self.memory_budget < 1:
                raise ValueError(f"memory_budget={self.memory_budget}: expected a number of bytes >= 1, or 'auto'")
        if not isinstance(self.accumulate_dtype, torch.dtype) or not self.accumulate_dtype.is_floating_point:
            raise TypeError(f"accumulate_dtype={self.accumulate_dtype!r}: expected a floating point torch.dtype")
        for name in ("scale", "softcap", "teacher_scale", "teacher_softcap"):
            if getattr(self, name) is not None:
                number(self, name, 0, open_low=True)
        self._write()

    @property
    def bytes(self) -> int:
        """The memory budget in bytes."""
        return 256 << 20 if self.memory_budget == "auto" else self.memory_budget


@functools.lru_cache(maxsize=256)
def parse_linear(text: str) -> LinearOptions:
    """Inverse of `LinearOptions.text`."""
    fields: dict[str, Any] = json.loads(text)
    del fields["kind"]
    fields["accumulate_dtype"] = getattr(torch, fields["accumulate_dtype"].removeprefix("torch."))
    return LinearOptions(**fields)


_TERMS = {term.__name__: term for term in TERMS}


def _term(fields: dict[str, Any]) -> Term:
    kind = _TERMS[fields.pop("type")]
    if fields.get("gate") is not None:
        fields["gate"] = Gate(**fields["gate"])
    return kind(**fields)


@functools.lru_cache(maxsize=256)
def parse(text: str) -> RowOptions:
    """Inverse of `RowOptions.text`."""
    fields: dict[str, Any] = json.loads(text)
    del fields["kind"]
    fields["values"] = tuple(fields["values"])
    fields["terms"] = tuple(Weighted(name, coefficient, _term(term)) for name, coefficient, term in fields["terms"])
    if fields["calibration"] is not None:
        fields["calibration"] = WClip(**fields["calibration"])
    return RowOptions(**fields)
