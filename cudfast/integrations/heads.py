"""The hidden states before the last layer of causal language models of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..linear.checks import autocast_dtype, check_gathered
from .inputs import Inputs, unwrapped


class Head:
    """The last layer of a causal model: ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    Args:
        model: a model of transformers with a backbone in `base_model` and an `nn.Linear` as output embeddings.
        name: the model's name in errors, "student" or "teacher".
        scale, softcap: of its logits. If they are 1.0 and None, `logit_scale` and `final_logit_softcapping` of the
            model's config are used.

    Raises:
        TypeError: a model of another structure. ValueError: a last layer that ZeRO-3 has partitioned, and (from
            `taken`) logits that do not equal that formula.
    """

    def __init__(self, model: nn.Module, name: str, scale: float, softcap: float | None) -> None:
        inner = unwrapped(model)
        self.backbone = getattr(inner, "base_model", inner)
        layer = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
        if self.backbone is inner or not isinstance(layer, nn.Linear) or "logits_to_keep" not in Inputs.of(inner).names:
            raise TypeError(
                f"{name}: {type(inner).__name__} cannot be read before its last layer: expected a causal language "
                "model of transformers with a base_model, an nn.Linear from get_output_embeddings() and a "
                "logits_to_keep argument of forward; use CUDLoss, which takes logits"
            )
        self.layer: nn.Linear = layer
        self.name = name
        self._check_gathered()
        config = inner.config.get_text_config()
        self.scale: float = (getattr(config, "logit_scale", None) or 1.0) if scale == 1.0 else scale
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None) if softcap is None else softcap
        self.hidden: Tensor | None = None
        self.autocast: torch.dtype | None = None  # of the region that the model ran in
        self._checked = False

    def watch(self) -> RemovableHandle:
        """Stores the last output of the backbone in `hidden` from now on, until the handle is removed."""

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.hidden = output[0]
            self.autocast = autocast_dtype(self.hidden.device.type)

        handle: RemovableHandle = self.backbone.register_forward_hook(keep)
        return handle

    @contextmanager
    def watched(self) -> Iterator[None]:
        """`watch` within a block."""
        handle = self.watch()
        try:
            yield
        finally:
            handle.remove()
            self.hidden = None

    def taken(self, logits: Tensor) -> Tensor:
        """The hidden states (B, S, D) of these logits (B, K, V), which are those of the last K positions. Call it once
        per forward."""
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        self._check_gathered()
        if not self._checked:
            self._check(hidden[:, -1], logits[:, -1])
            self._checked = True
        return hidden

    def _check_gathered(self) -> None:
        for part, given in (("weight", self.layer.weight), ("bias", self.layer.bias)):
            remedy = "use CUDLoss, which takes logits, or ZeRO-2"
            check_gathered(given, f"{self.name}: the {part} of its last layer", remedy)

    @torch.no_grad()
    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        """Raises unless the logits are those of the last layer for these hidden states, to bfloat16 precision."""
        made = F.linear(hidden, self.layer.weight, self.layer.bias).float() * self.scale
        if self.softcap is not None:
            made = self.softcap * torch.tanh(made / self.softcap)
        error, largest = (made - logits).abs().max().item(), logits.abs().max().item()
        if not error <= 0.02 * largest:
            raise ValueError(
                f"{self.name}: its logits differ by up to {error:.3g} (of {largest:.3g}) from its last layer's with "
                f"scale {self.scale} and soft cap {self.softcap}: if it scales them, pass {self.name}_logit_scale= or "
                f"{self.name}_logit_softcap= to FusedLinearCUDLoss; otherwise use CUDLoss, which takes logits"
            )
