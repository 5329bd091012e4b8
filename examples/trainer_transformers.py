"""A teacher fine-tuned with DUSLoss and a student distilled with CUDLoss by transformers' Trainer; seconds."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from cudfast import CUDLoss, DUSLoss
from cudfast.integrations.transformers import DistillationTrainer, TrainerLoss

CLASSES, VOCABULARY, LENGTH = 20, 100, 8


def model(width: int) -> BertForSequenceClassification:
    size = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 2 * width}
    config: dict[str, Any] = {"vocab_size": VOCABULARY, "num_labels": CLASSES, **size}
    return BertForSequenceClassification(BertConfig(**config))


def sentences(rows: int) -> Dataset:
    """A sentence belongs to the class that one of its first three words belongs to."""
    ids = torch.randint(VOCABULARY, (rows, LENGTH))
    labels = ids[torch.arange(rows), torch.randint(3, (rows,))] % CLASSES
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def main(steps: int = 150) -> dict[str, float]:
    """Held-out loss of the student, by either form of the hook."""
    torch.manual_seed(0)
    train, held_out = sentences(2000), sentences(500)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-3, report_to="none", use_cpu=True
        )
        teacher = model(64)
        Trainer(teacher, args, train_dataset=train, compute_loss_func=TrainerLoss(DUSLoss())).train()
        teacher.eval()

        student = model(16)
        loss = TrainerLoss(CUDLoss(), teacher, student)
        trainer = Trainer(student, args, train_dataset=train, eval_dataset=held_out, compute_loss_func=loss)
        trainer.train()
        found["compute_loss_func"] = trainer.evaluate()["eval_loss"]

        data = {"train_dataset": train, "eval_dataset": held_out}
        trainer = DistillationTrainer(model(16), args, teacher_model=teacher, loss=CUDLoss(), **data)
        trainer.train()
        found["DistillationTrainer"] = trainer.evaluate()["eval_loss"]
    return found


if __name__ == "__main__":
    print(main())
