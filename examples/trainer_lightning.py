"""Fine-tunes a teacher with DUSLoss and distils it with CUDLoss in Lightning; a few seconds on a CPU."""

from functools import partial

import torch
from lightning import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cudfast import CUDLoss, DUSLoss
from cudfast.integrations.lightning import DistillationModule

CLASSES, FEATURES = 20, 8


def data(rows: int, centres: torch.Tensor) -> TensorDataset:
    """Points around one centre per class, near enough to overlap."""
    labels = torch.randint(CLASSES, (rows,))
    return TensorDataset(centres[labels] + torch.randn(rows, FEATURES), labels)


def train(module: DistillationModule, train_rows: TensorDataset, held_out: TensorDataset) -> dict[str, float]:
    """Every metric of the last step and of the last validation."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train_rows, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=256))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def main() -> dict[str, float]:
    """The student's metrics."""
    seed_everything(0, verbose=False)
    centres = 1.5 * torch.randn(CLASSES, FEATURES)
    rows, held_out = data(2000, centres), data(1000, centres)
    adam = partial(torch.optim.Adam, lr=1e-2)
    teacher = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    found = train(DistillationModule(teacher, None, DUSLoss(), optimizer=adam), rows, held_out)
    print(f"teacher: held-out accuracy {found['val_accuracy']:.3f}")
    teacher.requires_grad_(False)
    student = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    found = train(DistillationModule(student, teacher, CUDLoss(), optimizer=adam), rows, held_out)
    print(f"student: held-out accuracy {found['val_accuracy']:.3f}, mass moved {found['train_moved_mass']:.3f}")
    return found


if __name__ == "__main__":
    main()
