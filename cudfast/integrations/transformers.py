"""The losses in the Trainer of transformers: as its `compute_loss_func`, and as a trainer of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..linear import FusedLinearCUDLoss, fused_linear_cud_loss
from ..losses import CUDLoss, DUSLoss
from .heads import Head, names_of, unwrapped
from .require import require

Trainer: Any = require("transformers", "transformers").Trainer
_losses: Any = require("transformers.loss.loss_utils", "transformers")

_NOT_THE_TEACHERS = frozenset({"labels", "num_items_in_batch", "logits_to_keep"})


def _logits(outputs: Any) -> Tensor:
    """(..., V) of a model's outputs, whichever form they have."""
    if isinstance(outputs, Tensor):
        return outputs
    found: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return found


def _shifts(model: nn.Module) -> bool | None:
    """Whether the model's own loss holds position i against label i + 1, by Trainer's rule; None: no way to know."""
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
    """Of hooks that belong together."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


class _Distillation:
    """The loss of a student's outputs, given what is kept of the batch: all that both forms of the hook share."""

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
        self.teacher_names = names_of(teacher) if teacher is not None else frozenset()
        self.student_names = names_of(student) if student is not None else frozenset()
        self._batch: dict[str, Any] | None = None

    def keep(self, batch: Mapping[str, Any], logits_too: bool) -> dict[str, Any]:
        """Keeps the teacher's inputs, and returns the student's: each has what it names, and what neither does.

        Where all logits of the student will be read, and not only the loss, `logits_too` says so.
        """
        own, other = self.teacher_names, self.student_names
        self._batch = {k: v for k, v in batch.items() if k not in _NOT_THE_TEACHERS and (k in own or k not in other)}
        return {k: v for k, v in batch.items() if k in other or k not in own}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it, `keep` is called, the student is run, and the loss is called."""
        yield

    def watch(self, student: nn.Module) -> Handles:
        """`keep` and what `reading` does, by hooks on the student."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, self.keep(kwargs, logits_too=not module.training)

        return Handles(student.register_forward_pre_hook(keep, with_kwargs=True))

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        """The loss of what the model returned; Trainer calls it."""
        logits = _logits(outputs)
        rows = self._rows(logits, labels, num_items_in_batch)
        if self.teacher is None:
            value: Tensor = self.loss(logits, **rows)
        else:
            value = self.loss(logits, _logits(self._taught(logits.device)).to(logits.device), **rows)
        return value

    def _rows(self, logits: Tensor, labels: Tensor | None, num_items: float | Tensor | None) -> dict[str, Any]:
        """Each row's label, and what the sum over rows is divided by."""
        if labels is None:
            raise ValueError(
                "labels is None: the batch has no 'labels'. Name the column labels (label works with the default "
                "collator), and give rows without one the label -1 for CUDLoss, or -100 where they count for nothing"
            )
        if logits.dim() == 3 and labels.dim() == 2:
            if self.shift is None:
                raise ValueError(
                    f"logits have shape {tuple(logits.shape)}, and the model does not say whose labels they are: pass "
                    "shift=True where position i predicts label i + 1 (causal language models), or shift=False"
                )
            if self.shift:  # rather than logits[:, :-1], whose gradient would be copied into a matrix of zeros
                labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        return {"labels": labels.to(logits.device), "num_items": _num_items(num_items, logits.device)}

    def _taught(self, device: torch.device) -> Any:
        """What the teacher makes of the batch that was kept."""
        teacher, batch, self._batch = self.teacher, self._batch, None
        assert teacher is not None
        if batch is None:
            raise RuntimeError(
                "the student was not run before its loss: expected student= to be the model that Trainer trains (with "
                "model_init=, or an adapter added later, it is another); pass that one, or use DistillationTrainer"
            )
        if teacher.training:
            raise RuntimeError(
                "the teacher is in training mode, where dropout changes its answers: call teacher.eval()"
            )
        place = next((p.device for p in teacher.parameters()), device)
        if place != device and not hasattr(teacher, "hf_device_map"):
            raise RuntimeError(
                f"the teacher is on {place} and the student on {device}: call teacher.to({str(device)!r})"
            )
        if "use_cache" in self.teacher_names:
            batch["use_cache"] = False
        try:
            with torch.no_grad():
                return teacher(**batch)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the teacher, {type(teacher).__name__}, was given {', '.join(batch) or 'no input that it takes'} and "
                f"failed: {error}. If a column is missing, Trainer dropped what the student's forward does not name: "
                "pass TrainingArguments(remove_unused_columns=False), or use DistillationTrainer, which keeps the "
                "columns of both"
            ) from error


def check_loss(loss: Any, accepted: tuple[type[Any], ...], hint: str = "") -> None:
    """That the loss is of an accepted kind, and counts what trainers count."""
    if not isinstance(loss, accepted):
        raise TypeError(
            f"loss: expected {' or '.join(kind.__name__ for kind in accepted)}, got {type(loss).__name__}{hint}"
        )
    if loss.options.reduction != "mean" or loss.options.ignore_index != -100:
        raise ValueError(
            f"loss has reduction={loss.options.reduction!r} and ignore_index={loss.options.ignore_index}: expected "
            "'mean' and -100, as trainers divide by the number of labels that are not -100"
        )


def _check_apart(teacher: nn.Module, student: nn.Module) -> None:
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    shared = next((name for name, p in teacher.named_parameters() if id(p) in trained), None)
    if shared is not None:
        raise ValueError(
            f"the teacher's parameter {shared} is the student's, too, and the optimizer would change it: give the "
            "teacher parameters of its own (copy.deepcopy), or call requires_grad_(False) on what both share"
        )


class _HiddenDistillation(_Distillation):
    """The same from the hidden states of two causal models."""

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


def _distillation(loss: Any, teacher: nn.Module | None, student: nn.Module | None, shift: bool | None) -> _Distillation:
    kind = _HiddenDistillation if isinstance(loss, FusedLinearCUDLoss) else _Distillation
    return kind(loss, teacher, student, shift)


class TrainerLoss:
    """`CUDLoss`, `FusedLinearCUDLoss` or `DUSLoss` for ``Trainer(..., compute_loss_func=TrainerLoss(...))``.

    With `CUDLoss` a forward pre-hook on the student keeps each batch, and the teacher runs on it under
    ``torch.no_grad()``, without labels and cache. The sum over rows is divided by `num_items_in_batch`, so the loss
    does not depend on gradient accumulation; rows of label -100 count for nothing. Logits (B, S, V) of a causal model
    are held against the next label, as the model's own loss does; those of a classifier (B, C), and of token
    classification, masked and encoder-decoder models, against their own.

    With `FusedLinearCUDLoss` the hook makes both causal models stop before their last layer (`logits_to_keep=1`), and
    the student's logits exist in evaluation only, where `Trainer` may return them; see `DistillationTrainer`.

    Args:
        loss: `CUDLoss`; `FusedLinearCUDLoss` for causal language models; `DUSLoss` to train a teacher.
            reduction="mean" and ignore_index=-100.
        teacher: in eval mode, on the device that trains; None for `DUSLoss`.
        student: the model given to Trainer; None for `DUSLoss`. ``handle.remove()`` takes the hook off it.
        shift: whether logits (B, S, V) predict the next label. Default None: as the student's own loss has it.

    Raises:
        TypeError: a loss of another kind, or a model that is missing. ValueError: options that Trainer cannot honour,
            parameters of the teacher that would be trained; when called: no labels, logits (B, S, V) of a model that
            does not say whether they shift, widths that differ without `num_classes`, inputs that the teacher refuses.
            RuntimeError, when called: a teacher in training mode or elsewhere, a student that did not run.

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
        self._distillation = _distillation(loss, teacher, student, shift)
        if teacher is not None and student is not None:
            self.handle = self._distillation.watch(student)

    @property
    def shift(self) -> bool | None:
        """Whether logits (B, S, V) are held against the next label; None where nothing says."""
        return self._distillation.shift

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: float | Tensor | None = None) -> Tensor:
        """The loss of what the model returned; Trainer calls it."""
        return self._distillation(outputs, labels, num_items_in_batch)


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with a teacher: the same loss as `TrainerLoss`, without a hook that stays on the student.

    The teacher is moved to the device that trains and runs under the student's autocast. Dataset columns that only the
    teacher's forward names are kept for it, and the student does not see them. With `FusedLinearCUDLoss` both causal
    models stop before their last layer (`logits_to_keep=1`), and logits never exist, except the student's where
    evaluation returns predictions; its scales and soft caps are those of the loss, or else `logit_scale` and
    `final_logit_softcapping` of the models' configs, and the first batch's last position checks them. That needs the
    weights of the last layer to be whole: neither FSDP nor ZeRO-3.

    Args:
        *args, **kwargs: as `transformers.Trainer`, but `compute_loss_func`; `model` is the student.
        teacher_model: in eval mode, its parameters are not trained.
        loss: `CUDLoss`, or `FusedLinearCUDLoss` for causal language models.
        shift: as in `TrainerLoss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `TrainerLoss`; TypeError for models that `FusedLinearCUDLoss` cannot
            read before their last layer, ValueError where the logits are made otherwise than it would make them.

    Example:
        >>> trainer = DistillationTrainer(
        ...     student, teacher_model=teacher, loss=CUDLoss(), train_dataset=data
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _signature_columns: list[str]

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
        self.compute_loss_func = _distillation(loss, teacher_model, self.model, shift)
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

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, *self.compute_loss_func.teacher_names})
