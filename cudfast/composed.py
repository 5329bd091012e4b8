"""Loss: a sum of terms as a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from .functional import composed_loss
from .options import BackendName, Reduction, RowOptions, Save, WClip
from .rows.shard import Shard
from .statistics import RowStatistics
from .targets.projection import Projection
from .terms import Focal, ForwardKL, Terms, Weighted, named

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def options_of(
    terms: Terms,
    calibration: WClip | Projection | None,
    unlabeled_index: int | str | None,
    **fields: Any,
) -> tuple[RowOptions, dict[str, Tensor]]:
    """The options of a loss of terms, and the focal scales per class (V,) by the names of their terms.

    Raises:
        TypeError, ValueError: terms that do not fit together.
    """
    found: list[Weighted] = []
    scales: dict[str, Tensor] = {}
    for name, coefficient, term in named(terms):
        if isinstance(term, Focal) and isinstance(term.alpha, Tensor):
            scales[name] = term.alpha.detach()
            term = dataclasses.replace(term, alpha=1.0)
        found.append(Weighted(name, coefficient, term))
    distilling = [w.term for w in found if w.term.distils]
    temperatures = {term.temperature for term in distilling if isinstance(term, ForwardKL)}
    if len(temperatures) > 1:
        raise ValueError(
            f"distillation terms at temperatures {', '.join(map(str, sorted(temperatures)))}: expected one temperature "
            "for all distillation terms of a loss"
        )
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
        temperature=temperatures.pop() if temperatures else 1.0,
        calibration=calibration,
        unlabeled_index=unlabeled_index,  # type: ignore[arg-type]  # checked there
        **fields,
    )
    return options, scales


class TermLoss(nn.Module):
    """A loss with a sum of terms. The scales per class of focal terms are persistent buffers, named after the terms."""

    options: RowOptions

    def set_options(self, options: RowOptions, scales: Mapping[str, Tensor]) -> None:
        """Takes what `options_of` made."""
        self.options = options
        for name, alpha in scales.items():
            self.register_buffer(f"{name}_alpha", alpha)

    @property
    def alpha(self) -> dict[str, Tensor]:
        """The buffers, by the names of their terms."""
        return {name.removesuffix("_alpha"): x for name, x in self._buffers.items() if x is not None}

    def extra_repr(self) -> str:
        return " + ".join(f"{coefficient:g} * {term!r}" for _, coefficient, term in self.options.terms)


class Loss(TermLoss):
    """A sum of terms in one pass over the logits: a loss of your own, as fast as the presets.

    Args:
        terms: a sum of terms with real coefficients, at most 8: `ForwardKL`, `CrossEntropy`, `Focal`, `Entropy`,
            `ZLoss`. Two terms of one kind need `name=`. See docs/losses.md for what each term is divided by.
        calibration: `WClip`, `Projection` or None, of the teacher. Default None. `WClip` and `Projection` need a
            distillation term.
        ignore_index: label of rows that are excluded. Default -100.
        unlabeled_index: label that marks a row as unlabelled: terms that need a label leave it out. Default "auto": -1
            with a distillation term, else None.
        reduction, num_classes, save, inplace, backend, check_finite, process_group, class_offset: as in `CUDLoss`.

    Shapes:
        student_logits (..., V), teacher_logits (..., V), labels (...), weight (...), temperature () or (...),
        term_weights: {name: number, () or (...)}; returns () or (...) for reduction="none". Dtypes as in `CUDLoss`.

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
            alpha=self.alpha,
            num_items=num_items,
            return_stats=return_stats,
            shard=self.shard,
        )
