"""What a user could pick instead. Peers that are not installed, or cannot do a shape, are left out and named.

`pip install --no-deps liger-kernel torchdistill`; TRL needs transformers, accelerate and datasets beside it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cudfast.bench.cases import TEMPERATURE, Inputs, through, with_gradient
from cudfast.bench.contestants import Contestant
from cudfast.bench.gate import Loss

from .heads import Found, Heads, with_gradients

# ---- From logits ----


def mft_style() -> Loss:
    """As ModelOpt's minifinetuning: the teacher is mixed with the label until the label leads by a margin; then KL."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        y, p = labels.unsqueeze(-1), teacher.softmax(-1)
        p_y = p.gather(-1, y)
        rival = p.scatter(-1, y, -1.0).amax(-1, keepdim=True)
        share = ((rival - p_y + 0.2) / (1 + rival - p_y)).clamp_min(0)
        target = (p * (1 - share)).scatter_add(-1, y, share)
        return functional.kl_div(student.log_softmax(-1), target, reduction="batchmean")

    return loss


def torchdistill() -> Loss:
    """Hinton's loss: KL with tau^2, and cross-entropy."""
    module: Any = importlib.import_module("torchdistill.losses.mid_level")
    kd = module.KDLoss("s", "output", "t", "output", temperature=TEMPERATURE, alpha=0.2)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = kd({"s": {"output": student}}, {"t": {"output": teacher}}, labels)
        return found

    return loss


def trl_jsd() -> Loss:
    """beta = 0: KL alone, the cheapest of the family; labels only mask."""
    module: Any = importlib.import_module("trl.experimental.gkd.gkd_trainer")

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        rows: Any = (x.unsqueeze(0) for x in (student, teacher, labels))
        found: Tensor = module.GKDTrainer.generalized_jsd_loss(*rows, beta=0.0, temperature=TEMPERATURE)
        return found

    return loss


DISTILLATION: dict[str, Callable[[], Loss]] = {
    "MFT-style": mft_style,
    "torchdistill KDLoss": torchdistill,
    "TRL generalized_jsd_loss": trl_jsd,
}
WHAT = {
    "eager PyTorch": "CUDLoss written with torch functions",
    "torch.compile": "the same functions, compiled for each shape",
    "MFT-style": "another correction of the teacher by the label (as in ModelOpt), eager; KL without tau^2 and CE",
    "torchdistill KDLoss": "KL and CE; no correction of the teacher",
    "TRL generalized_jsd_loss": "KL alone (beta = 0); labels are used only as a mask",
    "liger-kernel": "its kernels from logits need a GPU; its chunked losses from hidden states are timed below",
    "F.cross_entropy": "for reference: a loss without teacher",
    "torch.softmax": "for reference: one matrix, no gradient",
}


def distillation(data: Inputs, *, skip: str = "") -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can be raced from logits, and the reasons why others cannot. `skip`: a reason to leave out all."""
    found, absent = [], {"liger-kernel": "from logits, needs a GPU"}
    for name, build in DISTILLATION.items():
        if skip:
            absent[name] = f"left out: {skip}"
            continue
        try:
            loss = build()
        except ImportError as error:
            absent[name] = f"not installed ({error})"
            continue
        call = with_gradient(through(loss, data.student, data.teacher, data.labels))
        found.append(Contestant(name, call))
    return found, absent


# ---- From hidden states ----


def liger(x: Heads, *, chunk: int, compiled: bool) -> Callable[[], Found]:
    """KL and cross-entropy with the weights of ours; there is no clip and no tau^2 in it."""
    module: Any = importlib.import_module("liger_kernel.chunked_loss")

    loss = module.LigerFusedLinearJSDLoss(0.2, 0.8, 0.0, temperature=TEMPERATURE, compiled=compiled, chunk_size=chunk)
    return with_gradients(x, lambda: loss(x.h, x.w, x.th, x.tw, x.labels))


def trl(x: Heads, *, tokens: int = 4096, vocabulary: int = 32_768) -> Callable[[], Found]:
    """KL only, without labels. The defaults are TRL's tiles."""
    module: Any = importlib.import_module("trl.kernels.chunked_divergence")

    def loss() -> Tensor:
        module.TOKEN_CHUNK_SIZE, module.VOCAB_CHUNK_SIZE = tokens, vocabulary
        found: Tensor = module.ChunkedDivergenceFunction.apply(x.h, x.w, None, x.th, x.tw, None, 0.0, TEMPERATURE)[0]
        return found.mean()

    return with_gradients(x, loss)


def torch_ce(x: Heads, *, chunk: int | None = None, chunked: bool = True) -> Callable[[], Found]:
    """PyTorch's own linear cross-entropy (2.13); chunk None: of the size that it chooses."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk) if chunked else None
    return with_gradients(x, lambda: functional.linear_cross_entropy(x.h, x.w, x.labels, options=options))
