"""The columns of a batch that teacher and student get in transformers' Trainer: hidden signatures, forwards without
named inputs, and the advice of the errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from datasets import Dataset

from cudfast import CUDLoss, FusedLinearCUDLoss
from cudfast.integrations.transformers import DistillationTrainer

from .trainers import FORMS, Image, Text, arguments, batch_of, bert, by_hand, close, qwen, sentences, texts, trainer_of

SIDES = pytest.mark.parametrize("side", ["teacher", "student"])
ALL = {"remove_unused_columns": False}


class Nameless(nn.Module):
    """A model inside another one, whose forward names no input."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


class Partly(Nameless):
    """The same, with one of its inputs named."""

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return self.model(input_ids=input_ids, **others)


class Adapter(Nameless):
    """A stand-in for a model of PEFT."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def get_base_model(self) -> Any:
        return self.model


def patched(model: Any) -> Any:
    """With a forward of its own, that hides the class's."""
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    return model


def wrapped(model: Any) -> Any:
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = forward
    return model


def in_float32(model: Any) -> Any:
    """As accelerate prepares a model for mixed precision."""
    model._original_forward = model.forward
    model.forward = convert_outputs_to_fp32(model.forward)
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


HIDING: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "PEFT": Adapter,
    "patched": patched,
    "wraps": wrapped,
    "accelerate": in_float32,
    "device map": lambda model: add_hook_to_module(model, ModelHook()),
    "two of them": lambda model: compiled(Adapter(patched(model))),
}
OPEN: dict[str, Callable[[Any], Any]] = {
    "nameless": Nameless,
    "partly": Partly,
    "compiled nameless": lambda model: compiled(Nameless(model)),
}


def masked(rows: int = 16) -> Dataset:
    """Sentences, of which each other one ends early: another mask gives other logits."""
    data = sentences(rows).remove_columns("attention_mask")
    return data.add_column("attention_mask", [[1] * (7 - 3 * (row % 2)) + [0] * (3 * (row % 2)) for row in range(rows)])


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", HIDING)
def test_names_behind_what_hides_them(name: str) -> None:
    from cudfast.integrations.inputs import Inputs

    plain = Inputs.of(bert(0))
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} < plain.names
    assert not plain.open
    assert Inputs.of(HIDING[name](bert(0))) == plain


@pytest.mark.parametrize("name", ["DDP", "FSDP"])
def test_names_behind_what_spreads_a_model(name: str, one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    from cudfast.integrations.inputs import Inputs

    spread = nn.parallel.DistributedDataParallel if name == "DDP" else FullyShardedDataParallel
    kwargs = {} if name == "DDP" else {"device_id": torch.device("cpu")}
    assert Inputs.of(spread(bert(0), **kwargs)) == Inputs.of(bert(0))


@FORMS
@SIDES
@pytest.mark.parametrize("name", [*HIDING, *OPEN])
def test_a_step_behind_what_hides_the_names(form: str, side: str, name: str, tmp_path: Path) -> None:
    """With a column `token_type_ids` that both models read, and that the batch has whole."""
    data = masked()
    data = data.add_column("token_type_ids", [[row % 2] * 7 for row in range(16)])
    student, teacher = bert(0), bert(1, hidden=32).eval()
    wanted = by_hand(student, teacher, CUDLoss(), data)
    hide = {**HIDING, **OPEN}[name]
    models = (student, hide(teacher).eval()) if side == "teacher" else (hide(student), teacher)
    # Trainer's own rule drops columns for a student that hides its names; DistillationTrainer keeps them.
    changes = ALL if form == "hook" and side == "student" else {}
    trainer_of(form, *models, CUDLoss(), args=arguments(tmp_path, **changes), train_dataset=data).train()
    close(student, wanted)


@FORMS
@SIDES
def test_hidden_states_of_a_compiled_model(form: str, side: str, tmp_path: Path) -> None:
    student, teacher, data = qwen(0), qwen(1, 32).eval(), texts()
    wanted = by_hand(student, teacher, CUDLoss(), data)
    models = (student, compiled(teacher)) if side == "teacher" else (compiled(student), teacher)
    args = arguments(tmp_path, **(ALL if form == "hook" and side == "student" else {}))
    trainer_of(form, *models, FusedLinearCUDLoss(), args=args, train_dataset=data).train()
    close(student, wanted, 2e-6)


class OpenText(Text):
    def forward(self, **batch: Any) -> dict[str, Tensor]:
        return super().forward(batch["input_ids"])


class OpenImage(Image):
    def forward(self, **batch: Any) -> Tensor:
        return super().forward(batch["image"])


def pictures() -> Dataset:
    return sentences().remove_columns("attention_mask").add_column("image", torch.randn(16, 3).tolist())


@FORMS
@pytest.mark.parametrize(("read", "taught"), [(OpenText, Image), (Text, OpenImage), (OpenText, OpenImage)])
def test_each_model_reads_a_column_of_its_own(form: str, read: Any, taught: Any, tmp_path: Path) -> None:
    """A model that names its inputs is given no other beside one that names none, which is given all."""
    data, student, before, teacher = pictures(), read(), Text(), taught().eval()
    before.load_state_dict(student.state_dict())
    args = arguments(tmp_path, **(ALL if form == "hook" else {}))
    seen: list[set[str]] = []
    student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer = trainer_of(form, student, teacher, CUDLoss(), args=args, train_dataset=data)
    trainer.train()
    batch = batch_of(data)
    target = Image.forward(teacher, batch["image"]).detach()
    CUDLoss()(before(batch["input_ids"])["logits"], target, batch["labels"]).backward()
    torch.optim.SGD(before.parameters(), 0.1).step()
    close(student, before)
    assert seen[1] == ({"image"} if taught is Image else {"input_ids", "image"})


@FORMS
def test_a_column_of_the_teacher_alone(form: str, tmp_path: Path) -> None:
    data, student, before = pictures(), Text(), Text()
    before.load_state_dict(student.state_dict())
    teacher = Image().eval()
    args = arguments(tmp_path)
    if form == "hook":
        trainer = trainer_of(form, student, teacher, CUDLoss(), args=args, train_dataset=data)
        with pytest.raises(ValueError, match=r"Image, was given no input .*image.*remove_unused_columns=False"):
            trainer.train()
        trainer.compute_loss_func.handle.remove()
        args.remove_unused_columns = False
    trainer_of(form, student, teacher, CUDLoss(), args=args, train_dataset=data).train()
    batch = batch_of(data)
    target = teacher(batch["image"]).detach()
    CUDLoss()(before(batch["input_ids"])["logits"], target, batch["labels"]).backward()
    torch.optim.SGD(before.parameters(), 0.1).step()
    close(student, before)


def test_labels_that_only_the_loss_reads(tmp_path: Path) -> None:
    """The teacher names `labels` and the student does not: the loss has them, in training and in evaluation."""
    data = sentences().remove_columns("attention_mask").rename_column("label", "labels")
    student, teacher = Text(), bert(1).eval()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, per_device_eval_batch_size=16),
        train_dataset=data,
        eval_dataset=data,
        teacher_model=teacher,
        loss=CUDLoss(),
    )
    trainer.train()
    batch = batch_of(data)
    with torch.no_grad():
        logits = student(batch["input_ids"])["logits"], teacher(batch["input_ids"]).logits
        wanted = CUDLoss()(*logits, batch["labels"]).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def failing(form: str, student: Any, teacher: Any, data: Dataset, folder: Path, **changes: Any) -> str:
    """The message of the error in training."""
    with pytest.raises(ValueError, match=r"was given|labels is None") as error:
        trainer_of(form, student, teacher, CUDLoss(), args=arguments(folder, **changes), train_dataset=data).train()
    return str(error.value)


ADVICE = ("remove_unused_columns", "DistillationTrainer")


def test_advice_is_what_was_not_done(tmp_path: Path) -> None:
    data = pictures().remove_columns("image")
    for teacher in (Image().eval(), OpenImage().eval(), compiled(Image().eval())):
        open_ = isinstance(teacher, OpenImage)
        for form, changes in (("subclass", {}), ("subclass", ALL), ("hook", ALL)):
            found = failing(form, Text() if form == "subclass" else OpenText(), teacher, data, tmp_path, **changes)
            assert f"teacher, {'OpenImage' if open_ else 'Image'}, was given" in found
            assert "The columns of the batch are input_ids: if one is missing, add it to the data set" in found
            assert ("name the inputs in the teacher's forward" in found) == open_
            assert not any(words in found for words in ADVICE)
        found = failing("hook", Text(), teacher, data, tmp_path)  # whose columns Trainer may have dropped
        assert all(words in found for words in ADVICE)


@pytest.mark.parametrize("name", ["nameless", "compiled"])
def test_a_student_whose_columns_trainer_dropped(name: str, tmp_path: Path) -> None:
    student = {**HIDING, **OPEN}[name](bert(0))
    found = failing("hook", student, bert(1).eval(), sentences(), tmp_path)
    kind = "Nameless" if name == "nameless" else "BertForSequenceClassification"
    assert found.startswith(f"the student, {kind}, was given no input: Trainer dropped")
    assert all(words in found for words in ADVICE)


def test_label_names_are_advised_where_trainer_drops_labels(tmp_path: Path) -> None:
    data = pictures().rename_column("label", "labels")
    found = failing("hook", Text(), Image().eval(), data, tmp_path, label_names=None)
    assert "pass label_names=['labels'] to TrainingArguments" in found
    data = data.remove_columns("labels")
    assert "label_names" not in failing("subclass", Text(), Image().eval(), data, tmp_path)


def test_label_smoothing_is_that_of_the_loss(tmp_path: Path) -> None:
    """The factor of TrainingArguments is the loss's label smoothing, which equals Trainer's own formula."""
    student, teacher, data = bert(0), bert(1).eval(), sentences()
    wanted = by_hand(student, teacher, CUDLoss(label_smoothing=0.1), data)
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer_of("subclass", student, teacher, CUDLoss(), args=args, train_dataset=data).train()
    close(student, wanted)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1\) and a loss with label_smoothing=0.2"):
        DistillationTrainer(bert(0), args, teacher_model=bert(1).eval(), loss=CUDLoss(label_smoothing=0.2))


def test_the_hook_cannot_see_label_smoothing(tmp_path: Path) -> None:
    """Trainer calls the given loss instead of its own smoothing, as docs/trainers.md states."""
    student, teacher, data = bert(0), bert(1).eval(), sentences()
    wanted = by_hand(student, teacher, CUDLoss(), data)
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    trainer_of("hook", student, teacher, CUDLoss(), args=args, train_dataset=data).train()
    close(student, wanted)
