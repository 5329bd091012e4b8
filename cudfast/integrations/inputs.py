"""The entries of a batch that are inputs of a model of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .require import require

_accelerate: Any = require("accelerate.utils", "transformers")
_PreTrainedModel: Any = require("transformers", "transformers").PreTrainedModel


def unwrapped(model: nn.Module) -> Any:
    """The model inside torch.compile, DDP, FSDP, DataParallel, DeepSpeed and PEFT adapters, or the model."""
    while (inner := _inside(model)) is not model:
        model = inner
    return model


def _inside(model: Any) -> Any:
    if hasattr(model, "_orig_mod"):
        return model._orig_mod
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return _accelerate.extract_model_from_parallel(model)


def _signature(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The arguments that can be passed by name, and whether other names are accepted."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # a callable without a Python signature
        return frozenset(), True
    names = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return names - {"self"}, any(p.kind is p.VAR_KEYWORD for p in parameters)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a model's forward.

    Args:
        names: the arguments that it names.
        open: whether it accepts all other entries. Models of transformers that name their inputs do not: their
            ``**kwargs`` are options of attention.
    """

    names: frozenset[str] = frozenset()
    open: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Inputs:
        """The inputs by the signature of the model's forward, or of its class's if a replaced forward has none."""
        inner = unwrapped(model)
        names, others = _signature(inner.forward)
        if not names and others:
            names, others = _signature(inspect.getattr_static(type(inner), "forward"))
        return cls(names, others and not (names and isinstance(inner, _PreTrainedModel)))

    def of_batch(self, batch: Mapping[str, Any], other: Inputs) -> dict[str, Any]:
        """The entries for this model when another one uses the same batch: those that this one names, and those that
        neither model names.

        An open model gets the whole batch. If the other model is open, entries that neither names may be meant for it,
        so this model gets only those that it names.
        """
        if self.open:
            return dict(batch)
        return {k: v for k, v in batch.items() if k in self.names or not (other.open or k in other.names)}
