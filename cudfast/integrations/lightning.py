"""Distillation as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import CUDLoss, DUSLoss
from ..statistics import StudentStatistics, TeacherStatistics
from .require import require

require("lightning", "lightning")
from lightning import LightningModule  # noqa: E402


class DistillationModule(LightningModule):
    """Trains a student with `CUDLoss` under a frozen teacher, or a teacher with `DUSLoss`, in Lightning's Trainer.

    The teacher runs in eval mode under ``torch.no_grad()`` and is moved with the module to its device and dtype. It is
    not a submodule: ``parameters()`` and ``train()`` concern the student alone, and ``state_dict`` and checkpoints
    contain the student, and the loss's alpha if it has one value per class.

    Training logs ``train_loss`` and, each step, the means of the loss's statistics over the rows that have them:
    ``train_teacher_confidence``, ``train_moved_mass``, ``train_label_prob``, ``train_label_prob_calibrated``,
    ``train_student_nll``, ``train_student_confidence`` and ``train_accuracy`` (with `DUSLoss`: ``train_label_prob``,
    ``train_entropy``, ``train_confidence`` and ``train_accuracy``). Validation logs ``val_loss`` and ``val_accuracy``
    of the epoch. Their means weight a batch by its number of rows that are not ignored, and of labelled rows.

    A batch is a pair (inputs, labels), or a mapping with "labels" whose other entries are the models' keyword
    arguments. Override `split` for other batches, and `logits_of` for models that return neither logits (..., V) nor an
    object with ``.logits``.

    Args:
        student: the model that is trained.
        teacher: the model that it learns from, every parameter with requires_grad False; None to train with `DUSLoss`.
        loss: `CUDLoss` with a teacher, `DUSLoss` without; reduction "mean" or "sum".
        optimizer: function from the list of the student's trainable parameters to an optimizer, or to any other result
            that Lightning's ``configure_optimizers`` may return. Default `torch.optim.AdamW`.

    Raises:
        TypeError: `CUDLoss` without a teacher, `DUSLoss` with one, another loss, or a batch of another kind.
        ValueError: a teacher that requires grad or shares memory with the student, reduction="none", or a batch
            without labels. Errors of the loss are raised as well.

    Example:
        >>> from lightning import Trainer
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)
        >>> module = DistillationModule(student, teacher, CUDLoss(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        >>> rows = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
        >>> silent = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **silent)
        >>> trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8))
        >>> sorted(trainer.callback_metrics)[:3]
        ['train_accuracy', 'train_label_prob', 'train_label_prob_calibrated']
        >>> list(module.state_dict())
        ['student.weight', 'student.bias']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: CUDLoss | DUSLoss,
        *,
        optimizer: Callable[[list[nn.Parameter]], Any] = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        wanted = DUSLoss if teacher is None else CUDLoss
        if not isinstance(loss, wanted):
            raise TypeError(
                f"loss is {type(loss).__name__} and teacher {type(teacher).__name__}: expected CUDLoss and a teacher, "
                "or DUSLoss and teacher=None"
            )
        if loss.options.reduction == "none":
            raise ValueError("loss has reduction='none': expected 'mean' or 'sum', since Lightning needs one number")
        if teacher is not None:
            check_teacher(student, teacher)
            teacher.eval()
        self.student = student
        self.loss = loss
        self._teacher = (teacher,)  # in a tuple, so that it is not a submodule
        self._optimizer = optimizer

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationModule:
        """Called by .to(), .cuda(), .half() and similar methods; also converts the teacher."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def split(self, batch: Any) -> tuple[Any, Tensor | None]:
        """The models' inputs and the labels (...) of a batch; override it for batches of another kind."""
        if isinstance(batch, Mapping):
            if "labels" not in batch:
                raise ValueError(
                    f"the batch has {', '.join(map(repr, batch))} and no 'labels': add them, or override split(batch)"
                )
            return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"the batch is a {type(batch).__name__}{count}: expected a pair (inputs, labels) or a mapping with "
            "'labels'; override split(batch) for another kind"
        )

    def logits_of(self, model: nn.Module, inputs: Any) -> Tensor:
        """Logits (..., V) of the student or of the teacher."""
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        logits: Tensor = getattr(outputs, "logits", outputs)
        return logits

    def measure(self, batch: Any) -> tuple[Tensor, StudentStatistics | TeacherStatistics]:
        """The loss of a batch, and the statistics of its rows."""
        inputs, labels = self.split(batch)
        given = []
        if self.teacher is not None:
            with torch.no_grad():
                given.append(self.logits_of(self.teacher, inputs))
        return self.loss(self.logits_of(self.student, inputs), *given, labels, return_stats=True)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, stats = self.measure(batch)
        self.log("train_loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train_{name}": rows.nanmean() for name, rows in per_row(stats).items()})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, stats = self.measure(batch)
        rows = per_row(stats)
        count = int((~next(iter(rows.values())).isnan()).sum())  # every row that is not ignored has the first statistic
        if self.loss.options.reduction == "sum":
            loss = loss / max(count, 1)
        accuracy = rows["accuracy"]
        labelled = int((~accuracy.isnan()).sum())
        # As floats: whole numbers are averaged over processes and rounded down, and the mean divided by too little.
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=float(count))  # type: ignore[arg-type]
        mean = accuracy.nansum() / max(labelled, 1)
        self.log("val_accuracy", mean, sync_dist=True, batch_size=float(labelled))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return self._optimizer([parameter for parameter in self.student.parameters() if parameter.requires_grad])


def per_row(stats: StudentStatistics | TeacherStatistics) -> dict[str, Tensor]:
    """The statistics that can be averaged: the float ones and "accuracy", (...), NaN in rows that have none."""
    correct = stats.student_correct if isinstance(stats, StudentStatistics) else stats.correct
    rows = {name: value for name, value in stats._asdict().items() if value.is_floating_point()}
    rows["accuracy"] = correct.to(stats.label_prob.dtype).masked_fill(stats.label_prob.isnan(), torch.nan)
    return rows


def check_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Raises if an optimizer step could change the teacher."""
    memory = {p.untyped_storage().data_ptr(): name for name, p in student.named_parameters() if not p.is_meta}
    for name, parameter in teacher.named_parameters():
        shared = None if parameter.is_meta else memory.get(parameter.untyped_storage().data_ptr())
        if shared is not None:
            raise ValueError(
                f"the teacher's parameter {name!r} is the memory of the student's {shared!r}, and training would "
                "change it: expected a teacher with memory of its own; pass copy.deepcopy(teacher)"
            )
        if parameter.requires_grad:
            raise ValueError(
                f"the teacher's parameter {name!r} requires grad, and no gradient flows to the teacher: call "
                "teacher.requires_grad_(False) first"
            )
