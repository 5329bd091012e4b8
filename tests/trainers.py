"""Tiny models, data and a step by hand, for the tests of transformers' Trainer and of TRL's trainers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from cudfast.integrations.transformers import DistillationTrainer, TrainerLoss  # noqa: E402

CLASSES, VOCAB, PAD = 5, 64, 0


def bert(seed: int, hidden: int = 16, dropout: float = 0.0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def qwen(seed: int, hidden: int = 16, vocab: int = VOCAB, kind: str = "Qwen2", **config: Any) -> Any:
    torch.manual_seed(seed)
    made = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        pad_token_id=PAD,
        **{"initializer_range": 0.5, **config},
    )
    return getattr(transformers, f"{kind}ForCausalLM")(made)


class Text(nn.Module):
    """Reads `input_ids` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(VOCAB, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(self.embedding(input_ids).mean(1))}


class Image(nn.Module):
    """Reads a column that no other model names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image)  # type: ignore[no-any-return]


def sentences(rows: int = 16) -> Dataset:
    """For classification; of one length, so that any batch is the same."""
    ids = torch.randint(1, VOCAB, (rows, 7))
    labels = torch.randint(CLASSES, (rows,))
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * 7] * rows, "label": labels.tolist()})


def texts(rows: int = 16, side: str = "right") -> Dataset:
    """For language models: between 3 and 9 tokens, padded to 9 on one side; no loss of the padding."""
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in range(rows):
        ids = torch.randint(1, VOCAB, (3 + row % 7,)).tolist()
        blank = 9 - len(ids)
        for name, filled, empty in (
            ("input_ids", ids, PAD),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", ids, -100),
        ):
            found[name].append(filled + [empty] * blank if side == "right" else [empty] * blank + filled)
    return Dataset.from_dict(found)


ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Of plain SGD over everything: arguments of every trainer of transformers and TRL."""


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """ONE_STEP, unless changed."""
    return TrainingArguments(str(folder), **{**ONE_STEP, **changes})


def close(got: nn.Module, wanted: nn.Module, tolerance: float = 1e-6) -> None:
    for (name, a), b in zip(got.named_parameters(), wanted.parameters()):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def moved(student: nn.Module, before: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters()))


def batch_of(data: Dataset) -> dict[str, Tensor]:
    return {{"label": "labels"}.get(name, name): torch.tensor(data[name][:]) for name in data.column_names}


def by_hand(student: nn.Module, teacher: nn.Module, loss: Any, data: Dataset, lr: float = 0.1) -> nn.Module:
    """A copy of the student after one step."""
    student, batch = copy.deepcopy(student).train(), batch_of(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        target = teacher(**batch).logits
    logits, items = student(**batch).logits, (labels != -100).sum()
    if logits.dim() == 3:
        logits, target, labels, items = logits[:, :-1], target[:, :-1], labels[:, 1:], (labels[:, 1:] != -100).sum()
    loss(logits, target, labels, num_items=items).backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= lr * p.grad
    return student


def trainer_of(form: str, student: Any, teacher: Any, loss: Any, **kwargs: Any) -> Trainer:
    if form == "hook":
        return Trainer(student, compute_loss_func=TrainerLoss(loss, teacher, student), **kwargs)
    return DistillationTrainer(student, teacher_model=teacher, loss=loss, **kwargs)


FORMS = pytest.mark.parametrize("form", ["hook", "subclass"])
