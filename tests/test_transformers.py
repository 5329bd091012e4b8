"""The losses in transformers' Trainer: steps against steps by hand, accumulation, evaluation, saving, and errors."""

from __future__ import annotations

import copy
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from datasets import Dataset  # noqa: E402
from transformers import Trainer  # noqa: E402

from cudfast import CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss  # noqa: E402
from cudfast.integrations.transformers import DistillationTrainer, TrainerLoss  # noqa: E402

from .ranks import leave, spawn  # noqa: E402
from .trainers import (  # noqa: E402
    CLASSES,
    FORMS,
    VOCAB,
    arguments,
    batch_of,
    bert,
    by_hand,
    close,
    moved,
    qwen,
    sentences,
    texts,
    trainer_of,
)


@FORMS
@pytest.mark.parametrize("task", ["classes", "left", "right"])
def test_a_step_is_the_step_by_hand(form: str, task: str, tmp_path: Path) -> None:
    make, data = (bert, sentences()) if task == "classes" else (qwen, texts(side=task))
    student, teacher = make(0), make(1, hidden=32).eval()
    before, taught = copy.deepcopy(student), copy.deepcopy(teacher)
    wanted = by_hand(student, teacher, CUDLoss(), data)
    trainer = trainer_of(form, student, teacher, CUDLoss(), args=arguments(tmp_path), train_dataset=data)
    trainer.train()
    close(student, wanted)
    assert moved(student, before)
    close(teacher, taught, 0)
    assert all(p.grad is None for p in teacher.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in student.parameters()}


@pytest.mark.parametrize(
    ("form", "kind"), [("hook", "Qwen2"), ("subclass", "Qwen2"), ("subclass", "Gemma2"), ("hook", "Cohere")]
)  # plain; a soft cap; a scale
def test_hidden_states_give_the_step_of_the_logits(form: str, kind: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"Gemma2": {"final_logit_softcapping": 3.0}, "Cohere": {"logit_scale": 0.5}}.get(kind, {})
    student, teacher, data = qwen(0, kind=kind, **config), qwen(1, 32, kind=kind, **config).eval(), texts()
    wanted = by_hand(student, teacher, CUDLoss(), data)
    lengths = []
    handle = student.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 16}
    args = arguments(tmp_path, **changes)
    trainer = trainer_of(form, student, teacher, FusedLinearCUDLoss(), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    close(student, wanted, 2e-6)
    assert lengths == [1] * 4
    found = trainer.evaluate()
    assert lengths[4:] == [1 if form == "subclass" else 9]  # the hook cannot see what evaluation returns
    handle.remove()
    plain = trainer_of("subclass", student, teacher, CUDLoss(), args=trainer.args, eval_dataset=data)
    assert found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)
    assert trainer.predict(data).predictions.shape == (16, 9, VOCAB)
    if form == "hook":
        trainer.compute_loss_func.handle.remove()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in student.modules())


@FORMS
@pytest.mark.parametrize("task", ["classes", "text"])
def test_accumulation_changes_nothing(form: str, task: str, tmp_path: Path) -> None:
    make, data = (bert, sentences()) if task == "classes" else (qwen, texts())
    students = []
    for size, steps in ((16, 1), (4, 4)):
        student, teacher = make(0), make(1).eval()
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = trainer_of(form, student, teacher, CUDLoss(), args=arguments(tmp_path, **changes), train_dataset=data)
        trainer.train()
        students.append(student)
    close(*students)


def two_ranks(rank: int, ranks: int, folder: Path) -> None:
    """In each process: a step of both forms on half of the rows, in two micro-batches, left in the folder."""
    port = int((folder / "port").read_text())
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in where.items()})
    torch.set_num_threads(1)
    data = Dataset.load_from_disk(str(folder / "data"))
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}

    def train(form: str) -> None:
        student, teacher = qwen(0), qwen(1).eval()
        trainer = trainer_of(form, student, teacher, CUDLoss(), args=arguments(folder, **changes), train_dataset=data)
        assert trainer.args.world_size == ranks
        trainer.train()
        torch.save(student.state_dict(), folder / f"{form}.{rank}")

    for form in ("hook", "subclass"):
        train(form)
    leave()


@pytest.mark.processes
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Though half of the rows has more labels than the other: the divisor is that of all processes."""
    data = texts()
    data.save_to_disk(str(tmp_path / "data"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    assert spawn(two_ranks, 2, tmp_path) == [0, 0]
    wanted = by_hand(qwen(0), qwen(1).eval(), CUDLoss(), data)
    for form in ("hook", "subclass"):
        for rank in range(2):
            student = qwen(2)
            student.load_state_dict(torch.load(tmp_path / f"{form}.{rank}"))
            close(student, wanted)


@FORMS
def test_evaluation_is_the_mean_and_returns_predictions(form: str, tmp_path: Path) -> None:
    student, teacher, data = bert(0), bert(1).eval(), sentences(12)
    trainer = trainer_of(
        form,
        student,
        teacher,
        CUDLoss(),
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=data,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    found, batch = trainer.evaluate(), batch_of(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        wanted = CUDLoss()(student.eval()(**batch).logits, teacher(**batch).logits, labels)
    assert found["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    assert 0 <= found["eval_accuracy"] <= 1
    assert trainer.predict(data).predictions.shape == (12, CLASSES)


@FORMS
def test_padded_vocabulary(form: str, tmp_path: Path) -> None:
    student, teacher, data = qwen(0), qwen(1, vocab=72).eval(), texts()
    loss = CUDLoss(num_classes=VOCAB)
    wanted = by_hand(student, teacher, loss, data)
    trainer_of(form, student, teacher, loss, args=arguments(tmp_path), train_dataset=data).train()
    close(student, wanted)
    trainer = trainer_of(form, student, teacher, CUDLoss(), args=arguments(tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match=r"64 classes and teacher_logits has 72: .* pass num_classes=64"):
        trainer.train()


@FORMS
def test_resumes_from_a_checkpoint(form: str, tmp_path: Path) -> None:
    data, changes = texts(), {"max_steps": 4, "per_device_train_batch_size": 4, "optim": "adamw_torch"}
    ends = []
    for folder, resumed in (("whole", False), ("parts", True)):
        student, teacher = qwen(0), qwen(1).eval()
        saving = arguments(tmp_path / folder, save_strategy="steps", save_steps=2, **changes)
        trainer = trainer_of(form, student, teacher, CUDLoss(), args=saving, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2") if resumed else None)
        ends.append(student)
    close(*ends, 0)


@pytest.mark.parametrize(
    ("form", "loss"), [("subclass", CUDLoss()), ("subclass", FusedLinearCUDLoss()), ("hook", FusedLinearCUDLoss())]
)
def test_autocast_in_bfloat16(form: str, loss: Any, tmp_path: Path) -> None:
    student, teacher, data = qwen(0), qwen(1).eval(), texts()
    wanted = by_hand(student, teacher, CUDLoss(), data)
    before = copy.deepcopy(student)
    trainer_of(form, student, teacher, loss, args=arguments(tmp_path, bf16=True), train_dataset=data).train()
    close(student, wanted, 0.02)
    assert moved(student, before)


@FORMS
def test_a_saved_student_is_a_plain_model(form: str, tmp_path: Path) -> None:
    student, teacher = bert(0), bert(1).eval()
    keys = list(student.state_dict())
    trainer = trainer_of(form, student, teacher, CUDLoss(), args=arguments(tmp_path), train_dataset=sentences())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert type(again) is type(student)
    assert list(again.state_dict()) == keys
    close(again, student, 0)
    if form == "hook":
        trainer.compute_loss_func.handle.remove()
    assert not student._forward_pre_hooks
    torch.save(student, tmp_path / "whole.pt")


@pytest.mark.parametrize("task", ["classes", "text"])
def test_trains_the_teacher(task: str, tmp_path: Path) -> None:
    make, data = (bert, sentences()) if task == "classes" else (qwen, texts())
    model, batch = make(0), batch_of(data)
    wanted, labels = copy.deepcopy(model), batch.pop("labels")
    logits = wanted(**batch).logits
    if task == "text":
        logits, labels = logits[:, :-1], labels[:, 1:]
    DUSLoss()(logits, labels).backward()
    torch.optim.SGD(wanted.parameters(), 0.1).step()
    hook = TrainerLoss(DUSLoss(), shift=task == "text" or None)
    Trainer(model, args=arguments(tmp_path), train_dataset=data, compute_loss_func=hook).train()
    close(model, wanted)


def test_refuses() -> None:
    student, teacher = bert(0), bert(1).eval()
    cases: list[tuple[type[Exception], str, Any]] = [
        (
            TypeError,
            "expected CUDLoss or FusedLinearCUDLoss or DUSLoss, got FusedLinearDUSLoss",
            lambda: TrainerLoss(FusedLinearDUSLoss(), teacher, student),  # type: ignore[arg-type]
        ),
        (TypeError, "teacher is None: expected the teacher model", lambda: TrainerLoss(FusedLinearCUDLoss())),
        (TypeError, "teacher is None: expected the teacher model", lambda: TrainerLoss(CUDLoss(), None, student)),
        (TypeError, "student is None: expected the student model", lambda: TrainerLoss(CUDLoss(), teacher)),
        (TypeError, "DUSLoss trains the teacher", lambda: TrainerLoss(DUSLoss(), teacher)),
        (
            ValueError,
            "reduction='sum' and ignore_index=-100: expected 'mean' and -100",
            lambda: TrainerLoss(CUDLoss(reduction="sum"), teacher, student),
        ),
        (
            ValueError,
            "the teacher's parameter .* is the student's, too",
            lambda: TrainerLoss(CUDLoss(), student, student),
        ),
        (
            TypeError,
            "compute_loss_func was given to DistillationTrainer",
            lambda: DistillationTrainer(student, teacher_model=teacher, loss=CUDLoss(), compute_loss_func=print),
        ),
        (
            TypeError,
            "expected CUDLoss or FusedLinearCUDLoss or DUSLoss, got FusedLinearDUSLoss",
            lambda: DistillationTrainer(student, teacher_model=teacher, loss=FusedLinearDUSLoss()),
        ),  # type: ignore[arg-type]
        (
            TypeError,
            "student: BertForSequenceClassification cannot be read before its last layer",
            lambda: DistillationTrainer(student, teacher_model=teacher, loss=FusedLinearCUDLoss()),
        ),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()


def test_refuses_in_a_call() -> None:
    student, teacher = bert(0), bert(1)
    hook, batch = TrainerLoss(CUDLoss(), teacher, student), batch_of(sentences())
    labels = batch.pop("labels")
    outputs = student(**batch)
    with pytest.raises(RuntimeError, match=r"teacher is in training mode.*teacher\.eval\(\)"):
        hook(outputs, labels)
    teacher.eval()
    with pytest.raises(RuntimeError, match="the student was not run before its loss"):
        hook(outputs, labels)
    with pytest.raises(ValueError, match="the batch has no 'labels'"):
        hook(outputs, None)
    with pytest.raises(RuntimeError, match=r"num_items_in_batch has 2 values, .*torchrun"):
        hook(student(**batch), labels, torch.tensor([[8], [8]]))
    teacher.to("meta")
    with pytest.raises(RuntimeError, match=r"the teacher is on meta and the student on cpu: call teacher\.to\('cpu'\)"):
        hook(student(**batch), labels)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 3, 4\), .* pass shift=True"):
        TrainerLoss(DUSLoss())(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))


def test_who_shifts() -> None:
    tagger = transformers.BertForTokenClassification(bert(0).config)
    assert TrainerLoss(CUDLoss(), qwen(0), qwen(1)).shift
    assert TrainerLoss(CUDLoss(), bert(1), tagger).shift is False
    batch = batch_of(texts())
    labels = (batch.pop("labels") % CLASSES).where(batch["attention_mask"] > 0, -100)
    teacher = transformers.BertForTokenClassification(bert(1).config).eval()
    value = TrainerLoss(CUDLoss(), teacher, tagger)(tagger(**batch), labels, 7)
    with torch.no_grad():
        wanted = CUDLoss()(tagger.eval()(**batch).logits, teacher(**batch).logits, labels, num_items=7)
    torch.testing.assert_close(value, wanted)


def test_hidden_states_that_do_not_give_the_logits(tmp_path: Path) -> None:
    granite = {"kind": "Granite", "logits_scaling": 4.0}
    student, teacher, data = qwen(0, **granite), qwen(1).eval(), texts()
    trainer = trainer_of(
        "subclass", student, teacher, FusedLinearCUDLoss(), args=arguments(tmp_path), train_dataset=data
    )
    with pytest.raises(ValueError, match=r"student: its logits differ by up to .*student_logit_scale="):
        trainer.train()
    wanted = by_hand(student, teacher, CUDLoss(), data)
    loss = FusedLinearCUDLoss(student_logit_scale=0.25)
    trainer_of("subclass", student, teacher, loss, args=arguments(tmp_path), train_dataset=data).train()
    close(student, wanted, 2e-6)


@pytest.mark.parametrize("when", ["made", "run"])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_last_layer_that_was_not_gathered(name: str, when: str, tmp_path: Path) -> None:
    """DeepSpeed's ZeRO-3 leaves an empty parameter."""
    student, teacher, data = qwen(0), qwen(1).eval(), texts()
    layer = (student if name == "student" else teacher).lm_head

    def train() -> None:
        form = trainer_of("hook", student, teacher, FusedLinearCUDLoss(), args=arguments(tmp_path), train_dataset=data)
        if when == "run":
            layer.register_forward_hook(lambda *_: partition())
        form.train()

    def partition() -> None:
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    if when == "made":
        partition()
    with pytest.raises(ValueError, match=rf"{name}: the weight of its last layer has shape \(0,\): DeepSpeed ZeRO-3"):
        train()


def test_imports_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cudfast.integrations.transformers")
    with pytest.raises(ImportError, match=r"needs transformers.*pip install 'cudfast\[transformers\]'"):
        importlib.import_module("cudfast.integrations.transformers")


def test_example() -> None:
    example = pytest.importorskip("examples.trainer_transformers", reason="needs the source tree")
    assert all(0 < value < 3 for value in example.main(steps=20).values())
