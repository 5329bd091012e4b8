"""The losses for Trainer of transformers: the student's batch is stored for the teacher, then the loss is computed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..linear import FusedLinearCUDLoss, fused_linear_cud_loss
from ..losses import CUDLoss, DUSLoss
from .heads import Head
from .inputs import Inputs, unwrapped
from .require import require

_losses: Any = require("transformers.loss.loss_utils", "transformers")

_NOT_THE_TEACHERS = frozenset({"labels", "num_items_in_batch", "logits_to_keep"})
_DROPPED = (
    "Trainer dropped what the student's forward does not name: pass TrainingArguments(remove_unused_columns=False), or "
    "use DistillationTrainer, which keeps the columns of both"
)


def _logits(outputs: Any) -> Tensor:
    """Logits (..., V) from a model's outputs: a tensor, a mapping or a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    found: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return found


def _shifts(model: nn.Module) -> bool | None:
    """Whether the model's own loss compares position i with label i + 1, by Trainer's rule; None: unknown."""
    inner = unwrapped(model)
    if not hasattr(inner, "loss_type"):
        return None
    causal = _losses.LOSS_MAPPING.get(inner.loss_type, _losses.ForCausalLMLoss) is _losses.ForCausalLMLoss
    return causal and not inner.config.is_encoder_decoder


def _num_items(value: float | Tensor | None, device: torch.device) -> float | Tensor | None:
    if not isinstance(value, Tensor):
        return value
    if value.numel() > 1:
        raise RuntimeError(
            f"num_items_in_batch has {value.numel()} values, one per device of torch.nn.DataParallel, which is not "
            "supported: start one process per device, with torchrun or accelerate launch"
        )
    return value.to(device)


class Handles:
    """The handles of several hooks, removed together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self.handles:
            handle.remove()


class Distillation:
    """The loss of a student's outputs and the stored batch, for both `TrainerLoss` and `DistillationTrainer`."""

    def __init__(self, loss: Any, teacher: nn.Module | None, student: nn.Module | None, shift: bool | None) -> None:
        check_loss(loss, (CUDLoss, FusedLinearCUDLoss, DUSLoss))
        if isinstance(loss, DUSLoss):
            if teacher is not None:
                raise TypeError("DUSLoss trains the teacher and takes no other: leave teacher out, or use CUDLoss")
        elif teacher is None or student is None:
            missing = "teacher" if teacher is None else "student"
            raise TypeError(f"{missing} is None: expected the {missing} model, as {type(loss).__name__} compares two")
        else:
            _check_apart(teacher, student)
        self.loss: Any = loss
        self.teacher = teacher
        self.shift = _shifts(student) if shift is None and student is not None else shift
        self.teacher_inputs = Inputs() if teacher is None else Inputs.of(teacher)
        self.student_inputs = Inputs() if student is None else Inputs.of(student)
        self.columns_dropped = True  # whether Trainer drops the columns that the student's forward does not name
        self._columns: frozenset[str] = frozenset()
        self._batch: dict[str, Any] | None = None

    def keep(self, batch: Mapping[str, Any], logits_too: bool) -> dict[str, Any]:
        """Stores the teacher's inputs; returns the student's, with those that Trainer reads. See `Inputs.of_batch`.

        logits_too: whether all logits of the student will be read, and not only the loss.
        """
        columns = {k: v for k, v in batch.items() if k not in _NOT_THE_TEACHERS}
        self._columns = frozenset(columns)
        self._batch = self.teacher_inputs.of_batch(columns, self.student_inputs)
        own = self.student_inputs.of_batch(columns, self.teacher_inputs)
        return {k: v for k, v in batch.items() if k in _NOT_THE_TEACHERS or k in own}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context in which `keep` is called, the student is run, and the loss is called."""
        yield

    def watch(self, student: nn.Module) -> Handles:
        """Does the work of `keep` and `reading` in hooks on the student."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if not args and kwargs.keys() <= _NOT_THE_TEACHERS:
                raise ValueError(f"the student, {type(unwrapped(module)).__name__}, was given no input: {_DROPPED}")
            return args, self.keep(kwargs, logits_too=not module.training)

        return Handles(student.register_forward_pre_hook(keep, with_kwargs=True))

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        """The loss of a model's outputs; Trainer calls it."""
        logits = _logits(outputs)
        rows = self._rows(logits, labels, num_items_in_batch)
        if self.teacher is None:
            value: Tensor = self.loss(logits, **rows)
        else:
            value = self.loss(logits, _logits(self._taught(logits.device)).to(logits.device), **rows)
        return value

    def _rows(self, logits: Tensor, labels: Tensor | None, num_items: float | Tensor | None) -> dict[str, Any]:
        """The label of each row, and the divisor of the sum over rows."""
        if labels is None:
            hint = ", pass label_names=['labels'] to TrainingArguments if the student's forward does not name labels"
            raise ValueError(
                "labels is None: the batch has no 'labels'. Name the column labels (label works with the default "
                f"collator){hint if self.columns_dropped else ''}, and give rows without one the label -1 for CUDLoss, "
                "or -100 where they count for nothing"
            )
        if logits.dim() == 3 and labels.dim() == 2:
            if self.shift is None:
                raise ValueError(
                    f"logits have shape {tuple(logits.shape)}, and the model does not define which labels they "
                    "predict: pass shift=True if position i predicts label i + 1 (causal language models), or "
                    "shift=False"
                )
            if self.shift:  # not logits[:, :-1], whose gradient would be copied into a matrix of zeros
                labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return {"labels": labels.to(logits.device), "num_items": _num_items(num_items, logits.device)}

    def _taught(self, device: torch.device) -> Any:
        """The teacher's outputs for the stored batch."""
        teacher, batch, self._batch = self.teacher, self._batch, None
        assert teacher is not None
        if batch is None:
            raise RuntimeError(
                "the student was not run before its loss: expected student= to be the model that Trainer trains (with "
                "model_init=, or an adapter added later, it is another); pass that one, or use DistillationTrainer"
            )
        if teacher.training:
            raise RuntimeError(
                "the teacher is in training mode, where dropout changes its outputs: call teacher.eval()"
            )
        place = next((p.device for p in teacher.parameters()), device)
        if place != device and not hasattr(teacher, "hf_device_map"):
            raise RuntimeError(
                f"the teacher is on {place} and the student on {device}: call teacher.to({str(device)!r})"
            )
        if "use_cache" in self.teacher_inputs.names:
            batch["use_cache"] = False
        try:
            with torch.no_grad():
                return teacher(**batch)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the teacher, {type(unwrapped(teacher)).__name__}, was given "
                f"{', '.join(batch) or 'no input that it takes'} and failed: {error}. {self._remedy()}"
            ) from error

    def _remedy(self) -> str:
        """Advice for an error of the teacher's forward because of its inputs."""
        student, teacher = self.student_inputs, self.teacher_inputs
        if self.columns_dropped and self._columns <= student.names:
            return f"If a column is missing, {_DROPPED}"
        missing = (
            f"The columns of the batch are {', '.join(sorted(self._columns))}: if one is missing, add it to the data "
            "set or to what the collator returns"
        )
        spare = "; if one is too many, name the inputs in the teacher's forward, which is given all for its **kwargs"
        return missing + spare if teacher.open else missing


def check_loss(loss: Any, accepted: tuple[type[Any], ...], hint: str = "") -> None:
    """Raises unless the loss is of an accepted kind and its divisor is that of trainers."""
    if not isinstance(loss, accepted):
        raise TypeError(
            f"loss: expected {' or '.join(kind.__name__ for kind in accepted)}, got {type(loss).__name__}{hint}"
        )
    if loss.options.reduction != "mean" or loss.options.ignore_index != -100:
        raise ValueError(
            f"loss has reduction={loss.options.reduction!r} and ignore_index={loss.options.ignore_index}: expected "
            "'mean' and -100, as trainers divide by the number of labels that are not -100"
        )


def smoothed(loss: Any, args: Any) -> Any:
    """The loss with the label smoothing of TrainingArguments, which Trainer leaves to the loss that it is given.

    Raises:
        ValueError: the loss has another label smoothing of its own.
    """
    factor = args.label_smoothing_factor
    if not factor:
        return loss
    own = loss.options.label_smoothing
    if own not in (0, factor):
        raise ValueError(
            f"TrainingArguments(label_smoothing_factor={factor}) and a loss with label_smoothing={own}: expected the "
            "same value, or one of the two alone"
        )
    found = copy.copy(loss)
    found.options = dataclasses.replace(loss.options, label_smoothing=factor)
    return found


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    shared = next((name for name, p in teacher.named_parameters() if id(p) in trained), None)
    if shared is not None:
        raise ValueError(
            f"the teacher's parameter {shared} is the student's, too, and the optimizer would change it: give the "
            "teacher parameters of its own (copy.deepcopy), or call requires_grad_(False) on what both share"
        )


class HiddenDistillation(Distillation):
    """`Distillation` from the hidden states of two causal models."""

    def __init__(self, loss: Any, teacher: nn.Module | None, student: nn.Module | None, shift: bool | None) -> None:
        super().__init__(loss, teacher, student, shift)
        assert teacher is not None
        assert student is not None
        given = loss.linear
        self.student_head = Head(student, "student", given.scale, given.softcap)
        self.teacher_head = Head(teacher, "teacher", given.teacher_scale, given.teacher_softcap)
        self.linear = dataclasses.replace(
            given,
            scale=self.student_head.scale,
            softcap=self.student_head.softcap,
            teacher_scale=self.teacher_head.scale,
            teacher_softcap=self.teacher_head.softcap,
        )

    def keep(self, batch: Mapping[str, Any], logits_too: bool) -> dict[str, Any]:
        inputs = super().keep(batch, logits_too)
        assert self._batch is not None
        self._batch["logits_to_keep"] = 1
        return inputs if logits_too else {**inputs, "logits_to_keep": 1}

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self.student_head.watched():
            yield

    def watch(self, student: nn.Module) -> Handles:
        return Handles(*super().watch(student).handles, self.student_head.watch())

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        logits, head = _logits(outputs), self.student_head
        with self.teacher_head.watched():
            taught = self.teacher_head.taken(_logits(self._taught(logits.device))).to(logits.device)
        hidden = head.taken(logits)
        student, teacher = head.layer, self.teacher_head.layer
        with torch.autocast(hidden.device.type, head.autocast, enabled=head.autocast is not None):
            value: Tensor = fused_linear_cud_loss(
                hidden,
                student.weight,
                options=self.loss.options,
                linear=self.linear,
                student_bias=student.bias,
                teacher_hidden=taught,
                teacher_weight=teacher.weight.detach(),
                teacher_bias=None if teacher.bias is None else teacher.bias.detach(),
                **self._rows(hidden, labels, num_items_in_batch),
            )
        return value


def distillation(loss: Any, teacher: nn.Module | None, student: nn.Module | None, shift: bool | None) -> Distillation:
    kind = HiddenDistillation if isinstance(loss, FusedLinearCUDLoss) else Distillation
    return kind(loss, teacher, student, shift)
