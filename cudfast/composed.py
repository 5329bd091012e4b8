"""Loss: a sum of terms as a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .functional import composed_loss
from .options import BackendName, Reduction, RowOptions, Save, WClip
from .rows.shard import Shard
from .statistics import RowStatistics
from .targets.projection import Projection
from .terms import CrossEntropy, ForwardKL, ReverseKL, Terms, Weighted, named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def options_of(
    terms: Terms,
    calibration: WClip | Projection | None,
    unlabeled_index: int | str | None,
    values: Sequence[str] = (),
    **fields: Any,
) -> tuple[RowOptions, dict[str, Tensor]]:
    """The options of a loss of terms, and the tensors per class (V,) of its terms, by the names of the terms.

    Raises:
        TypeError, ValueError: terms that do not fit together.
    """
    found: list[Weighted] = []
    per_class: dict[str, Tensor] = {}
    for name, coefficient, term in named(terms):
        term, of_classes = term.split()
        if of_classes is not None:
            per_class[name] = of_classes
        found.append(Weighted(name, coefficient, term))
    distilling = [w.term for w in found if w.term.distils]
    temperatures = {(term.temperature, term.teacher_temperature) for term in distilling if isinstance(term, ForwardKL)}
    if len(temperatures) > 1:
        own, teachers = (", ".join(map(str, found)) for found in zip(*sorted(temperatures, key=str)))
        raise ValueError(
            f"distillation terms at temperatures {own} (of the teacher: {teachers}): expected one temperature, and one "
            "teacher_temperature, for all distillation terms of a loss"
        )
    temperature, teacher_temperature = temperatures.pop() if temperatures else (1.0, None)
    entropies = [weighted.name for weighted in found if isinstance(weighted.term, CrossEntropy)]
    if len(entropies) > 1 and any(name in per_class for name in entropies):
        raise ValueError(
            f"{', '.join(entropies)}: class_weight in a loss of several cross-entropies: expected one CrossEntropy"
        )
    if isinstance(calibration, Projection) and any(isinstance(term, ReverseKL) for term in distilling):
        raise ValueError("calibration=Projection(...) with ReverseKL: expected ForwardKL alone, or WClip, or None")
    if not (calibration is None or isinstance(calibration, (WClip, Projection))):
        raise TypeError(f"calibration={calibration!r}: expected WClip(budget, margin), Projection(...) or None")
    if calibration is not None and not distilling:
        raise ValueError(
            f"calibration={calibration!r} without a distillation term: nothing reads the calibrated teacher; add "
            "a term such as ForwardKL(), or leave calibration out"
        )
    if unlabeled_index == "auto":
        unlabeled_index = -1 if distilling else None
    options = RowOptions(
        terms=tuple(found),
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        calibration=calibration,
        unlabeled_index=unlabeled_index,  # type: ignore[arg-type]  # checked there
        values=tuple(values),
        **fields,
    )
    return options, per_class


class TermLoss(nn.Module):
    """A loss with a sum of terms. Tensors per class of its terms are persistent buffers, named after term and field."""

    options: RowOptions

    def set_options(self, options: RowOptions, per_class: Mapping[str, Tensor]) -> None:
        """Takes what `options_of` made."""
        self.options = options
        for name, _, term in options.terms:
            if name in per_class:
                self.register_buffer(f"{name}_{term.per_class}", per_class[name])

    @property
    def per_class(self) -> dict[str, Tensor]:
        """The buffers, by the names of their terms."""
        buffers = {name: self._buffers.get(f"{name}_{term.per_class}") for name, _, term in self.options.terms}
        return {name: x for name, x in buffers.items() if x is not None}

    def extra_repr(self) -> str:
        return " + ".join(f"{coefficient:g} * {term!r}" for _, coefficient, term in self.options.terms)


class Loss(TermLoss):
    """A sum of terms in one pass over the logits: a loss of your own, as fast as the presets.

    Args:
        terms: a sum of terms with real coefficients, at most 8: `ForwardKL`, `ReverseKL`, `CrossEntropy`, `Focal`,
            `Entropy`, `ZLoss`. Two terms of one kind need `name=`. See docs/losses.md for what each term is divided by.
        calibration: `WClip`, `Projection` or None, of the teacher. Default None. `WClip` and `Projection` need a
            distillation term.
        ignore_index: label of rows that are excluded. Default -100.
        unlabeled_index: label that marks a row as unlabelled: terms that need a label leave it out. Default "auto": -1
            with a distillation term, else None.
        values: names of values that `stats.values` shall have besides the terms, in nats: "student_entropy",
            "teacher_entropy" (before calibration, at temperature 1), "lse" (log sum exp of the student's logits),
            "label_log_prob" (log p_y), "brier" (``sum_j (p_j - 1[j = y])^2``). Default none.
        reduction, num_classes, save, inplace, backend, check_finite, process_group, class_offset: as in `CUDLoss`.

    Shapes:
        student_logits (..., V), teacher_logits (..., V), labels (...), weight (...), temperature () or (...),
        term_weights: {name: number, () or (...)}, smoothing () or (...), bias (V,); returns () or (...) for reduction="none". Dtypes as in `CUDLoss`.

    Raises:
        TypeError, ValueError: terms that do not fit together, or an argument out of range.

    Example:
        >>> import torch
        >>> from cudfast import CrossEntropy, ForwardKL, Loss, WClip, ZLoss
        >>> loss = Loss(0.8 * ForwardKL() + 0.2 * CrossEntropy() + 1e-4 * ZLoss(), calibration=WClip())
        >>> student, teacher = torch.randn(8, 77, requires_grad=True), torch.randn(8, 77)
        >>> labels = torch.randint(77, (8,))
        >>> value, stats = loss(student, teacher, labels, return_stats=True)
        >>> value.backward()
        >>> sorted(stats.terms)
        ['cross_entropy', 'forward_kl', 'z_loss']
    """

    def __init__(
        self,
        terms: Terms,
        *,
        calibration: WClip | Projection | None = None,
        ignore_index: int = -100,
        unlabeled_index: int | Literal["auto"] | None = "auto",
        values: Sequence[str] = (),
        reduction: Reduction = "mean",
        num_classes: int | None = None,
        save: Save = "auto",
        inplace: bool = False,
        backend: BackendName = "auto",
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
        class_offset: int | None = None,
    ) -> None:
        super().__init__()
        self.shard = Shard.of(process_group, class_offset)
        self.set_options(
            *options_of(
                terms,
                calibration,
                unlabeled_index,
                values=values,
                ignore_index=ignore_index,
                reduction=reduction,
                num_classes=num_classes,
                save=save,
                inplace=inplace,
                backend=backend,
                check_finite=check_finite,
            )
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        temperature: float | Tensor | None = None,
        term_weights: Mapping[str, float | Tensor] | None = None,
        smoothing: float | Tensor | None = None,
        bias: Tensor | None = None,
        num_items: float | Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        """The loss; arguments as in `cudfast.functional.composed_loss`."""
        return composed_loss(
            student_logits,
            teacher_logits,
            labels,
            self.options,
            weight=weight,
            temperature=temperature,
            term_weights=term_weights,
            smoothing=smoothing,
            bias=bias,
            per_class=self.per_class,
            num_items=num_items,
            return_stats=return_stats,
            shard=self.shard,
        )
