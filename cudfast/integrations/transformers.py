"""The losses in the Trainer of transformers: as its `compute_loss_func`, and as a trainer of its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..linear import FusedLinearCUDLoss
from ..losses import CUDLoss, DUSLoss
from .distillation import check_loss, distillation, smoothed
from .inputs import Inputs
from .require import require

Trainer: Any = require("transformers", "transformers").Trainer


class TrainerLoss:
    """`CUDLoss`, `FusedLinearCUDLoss` or `DUSLoss` for ``Trainer(..., compute_loss_func=TrainerLoss(...))``.

    With `CUDLoss` a forward pre-hook on the student stores each batch, and the teacher runs on it under
    ``torch.no_grad()``, without labels and cache. The sum over rows is divided by `num_items_in_batch`, so the loss
    does not depend on gradient accumulation; rows of label -100 are excluded. Logits (B, S, V) of a causal model
    predict the next label, as in the model's own loss; those of a classifier (B, C), and of token classification,
    masked and encoder-decoder models, predict the label of their own position.

    Each model gets the columns that its forward names; a model whose forward takes ``**kwargs`` instead of names gets
    all columns. `Trainer` drops columns by the student's signature, so a student without named inputs needs
    ``TrainingArguments(remove_unused_columns=False, label_names=["labels"])``. With a `compute_loss_func` Trainer
    ignores `label_smoothing_factor`, which this class cannot read: pass ``CUDLoss(label_smoothing=...)``.

    With `FusedLinearCUDLoss` the hook makes both causal models stop before their last layer (`logits_to_keep=1`). The
    student's logits exist in evaluation only, where `Trainer` may return them; see `DistillationTrainer`.

    Args:
        loss: `CUDLoss`; `FusedLinearCUDLoss` for causal language models; `DUSLoss` to train a teacher.
            reduction="mean" and ignore_index=-100.
        teacher: in eval mode, on the device of the training; None for `DUSLoss`.
        student: the model given to Trainer; None for `DUSLoss`. ``handle.remove()`` removes the hook from it.
        shift: whether logits (B, S, V) predict the next label. Default None: as in the student's own loss.

    Raises:
        TypeError: a loss of another kind, or a model that is missing. ValueError: options that Trainer cannot honour,
            parameters of the teacher that would be trained; when called: no labels, logits (B, S, V) of a model whose
            own loss does not define `shift`, different widths without `num_classes`, inputs that the teacher's forward
            does not accept. RuntimeError, when called: a teacher in training mode or on another device, a student that
            was not run.

    Example:
        >>> import torch
        >>> from transformers.modeling_outputs import SequenceClassifierOutput as Output
        >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).eval()
        >>> loss, x = TrainerLoss(CUDLoss(), teacher, student), torch.randn(8, 4)
        >>> outputs = Output(logits=student(input=x))
        >>> loss(outputs, torch.randint(3, (8,)), num_items_in_batch=16).backward()
        >>> student.weight.grad.shape, teacher.weight.grad
        (torch.Size([3, 4]), None)
    """

    def __init__(
        self,
        loss: CUDLoss | FusedLinearCUDLoss | DUSLoss,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        *,
        shift: bool | None = None,
    ) -> None:
        self._distillation = distillation(loss, teacher, student, shift)
        if teacher is not None and student is not None:
            self.handle = self._distillation.watch(student)

    @property
    def shift(self) -> bool | None:
        """Whether logits (B, S, V) predict the next label; None if it is unknown."""
        return self._distillation.shift

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        """The loss of a model's outputs; Trainer calls it."""
        return self._distillation(outputs, labels, num_items_in_batch)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with a teacher: the same loss as `TrainerLoss`, without a permanent hook on the student.

    The teacher is moved to the device of the training and runs under the student's autocast. Dataset columns that only
    the teacher's forward names are kept for it, and the student does not get them; if a forward takes ``**kwargs``
    instead of names, no column is dropped.

    `label_smoothing_factor` is the loss's label smoothing.

    With `FusedLinearCUDLoss` both causal models stop before their last layer (`logits_to_keep=1`), and logits do not
    exist, except the student's if evaluation returns predictions. Scales and soft caps are those of the loss, or else
    `logit_scale` and `final_logit_softcapping` of the models' configs; they are checked at the last position of the
    first batch. The weights of the last layer must not be sharded: neither FSDP nor ZeRO-3.

    Args:
        *args, **kwargs: as `transformers.Trainer`, except `compute_loss_func`; `model` is the student.
        teacher_model: in eval mode, its parameters are not trained.
        loss: `CUDLoss`, or `FusedLinearCUDLoss` for causal language models.
        shift: as in `TrainerLoss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `TrainerLoss`; ValueError for a `label_smoothing_factor` that differs
            from the loss's own; for `FusedLinearCUDLoss`, TypeError for models whose hidden states before the last
            layer are not accessible, and ValueError if their logits do not equal its own.

    Example:
        >>> trainer = DistillationTrainer(
        ...     student, teacher_model=teacher, loss=CUDLoss(), train_dataset=data
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _signature_columns: list[str]
    label_names: list[str]

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module,
        loss: CUDLoss | FusedLinearCUDLoss,
        shift: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise TypeError("compute_loss_func was given to DistillationTrainer: pass loss= alone, or use Trainer")
        super().__init__(*args, **kwargs)
        check_loss(loss, (CUDLoss, FusedLinearCUDLoss))
        self.compute_loss_func = distillation(smoothed(loss, self.args), teacher_model, self.model, shift)
        self.compute_loss_func.columns_dropped = False
        if "labels" not in self.label_names and self.args.label_names is None:
            self.label_names = ["labels"]  # the name for the loss, if the student's forward does not name labels
        if not hasattr(teacher_model, "hf_device_map"):
            teacher_model.to(self.args.device)
        self._returns_logits = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `Trainer.compute_loss`, which it calls."""
        with ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            stack.enter_context(self.compute_loss_func.reading())
            inputs = self.compute_loss_func.keep(inputs, self._returns_logits)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As `Trainer.prediction_step`, which it calls."""
        self._returns_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._returns_logits = False

    @property
    def _inputs(self) -> tuple[Inputs, Inputs]:
        """The inputs of student and teacher."""
        return self.compute_loss_func.student_inputs, self.compute_loss_func.teacher_inputs

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(set(self._signature_columns).union(*(found.names for found in self._inputs)))

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """As Trainer's, if both models name their inputs."""
        if any(found.open for found in self._inputs):
            return dataset
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        """As Trainer's, if both models name their inputs."""
        if any(found.open for found in self._inputs):
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)
