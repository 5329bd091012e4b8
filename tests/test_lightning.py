"""DistillationModule in Lightning's Trainer: steps, accumulation, checkpoints, what it logs and what it refuses."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils.data import DataLoader, TensorDataset

from cudfast import CUDLoss, DUSLoss, FusedLinearCUDLoss, calibrate

lightning = pytest.importorskip("lightning")

from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from cudfast.integrations.lightning import DistillationModule  # noqa: E402

from .ranks import leave  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning:lightning")
ROWS, FEATURES, CLASSES = 16, 6, 5
sgd = functools.partial(torch.optim.SGD, lr=0.5)


class Setup:
    """A student, a teacher with dropout and running statistics, and 16 rows."""

    def __init__(self) -> None:
        self.student = nn.Linear(FEATURES, CLASSES)
        body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
        self.teacher = body.requires_grad_(False)
        self.x, self.labels = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))

    def module(self, loss: CUDLoss | None = None, optimizer: Any = sgd) -> DistillationModule:
        return DistillationModule(copy.deepcopy(self.student), self.teacher, loss or CUDLoss(), optimizer=optimizer)

    def batches(self, size: int = ROWS) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.x, self.labels), batch_size=size)


def trainer_in(path: Path, **options: Any) -> Any:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=path, enable_checkpointing=False, **silent, **options)


def fit(path: Path, module: Any, batches: Any, epochs: int = 1, ckpt_path: Path | None = None, **options: Any) -> Any:
    trainer = trainer_in(path, max_epochs=epochs, **options)
    trainer.fit(module, batches, ckpt_path=ckpt_path)
    return trainer


def difference(a: nn.Module, b: nn.Module) -> float:
    """The largest, over parameters."""
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


def test_one_step_by_hand(tmp_path: Path) -> None:
    x = Setup()
    module = x.module()
    fit(tmp_path, module, x.batches())
    plain = copy.deepcopy(x.student)
    CUDLoss()(plain(x.x), x.teacher.eval()(x.x), x.labels).backward()
    sgd(plain.parameters()).step()
    assert difference(module.student, plain) < 1e-6 < 1e-2 < difference(module.student, x.student)


def test_accumulation_with_as_many_labels_in_every_micro_batch(tmp_path: Path) -> None:
    x = Setup()
    x.labels[::4], x.labels[1::4] = -1, -100
    whole, parts = x.module(), x.module()
    fit(tmp_path, whole, x.batches(16))
    fit(tmp_path, parts, x.batches(4), accumulate_grad_batches=4)
    assert difference(whole.student, parts.student) < 1e-6


def test_a_sum_weighs_every_row_the_same(tmp_path: Path) -> None:
    """Whatever the labels per micro-batch: 4x4 is 16x1 at a quarter of the learning rate."""
    x = Setup()
    x.labels[:3], x.labels[5] = -1, -100
    whole = x.module(CUDLoss(reduction="sum"), functools.partial(torch.optim.SGD, lr=0.01))
    parts = x.module(CUDLoss(reduction="sum"), functools.partial(torch.optim.SGD, lr=0.04))
    fit(tmp_path, whole, x.batches(16))
    fit(tmp_path, parts, x.batches(4), accumulate_grad_batches=4)
    assert difference(whole.student, parts.student) < 1e-6


def test_resume(tmp_path: Path) -> None:
    x = Setup()
    adam = functools.partial(torch.optim.AdamW, lr=0.05)
    straight, first, second = (x.module(optimizer=adam) for _ in range(3))
    fit(tmp_path, straight, x.batches(8), epochs=3)
    fit(tmp_path, first, x.batches(8), epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, second, x.batches(8), epochs=3, ckpt_path=tmp_path / "one.ckpt")
    assert difference(first.student, straight.student) > 1e-2
    assert difference(second.student, straight.student) < 1e-6


def test_a_checkpoint_holds_the_student_alone(tmp_path: Path) -> None:
    x = Setup()
    module = x.module(optimizer=torch.optim.AdamW)
    fit(tmp_path, module, x.batches()).save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt")
    assert list(checkpoint["state_dict"]) == ["student.weight", "student.bias"]
    assert len(checkpoint["optimizer_states"][0]["state"]) == 2
    plain = nn.Linear(FEATURES, CLASSES)
    consume_prefix_in_state_dict_if_present(checkpoint["state_dict"], "student.")
    plain.load_state_dict(checkpoint["state_dict"])
    assert difference(plain, module.student) == 0
    again = nn.Linear(FEATURES, CLASSES)
    DistillationModule.load_from_checkpoint(tmp_path / "last.ckpt", student=again, teacher=x.teacher, loss=CUDLoss())
    assert difference(again, module.student) == 0


def test_the_teacher_is_left_alone(tmp_path: Path) -> None:
    x = Setup()
    before = copy.deepcopy(x.teacher.state_dict())
    module = x.module()
    module.train()
    fit(tmp_path, module, x.batches(4), epochs=2)
    after = x.teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(part.training for part in x.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in x.teacher.parameters())
    assert len(list(module.parameters())) == 2


def test_the_teacher_follows() -> None:
    module = Setup().module()
    assert module.teacher is not None
    assert {p.dtype for p in module.double().teacher.parameters()} == {torch.float64}
    assert {p.device.type for p in module.to("meta").teacher.parameters()} == {"meta"}


def test_bf16_mixed_precision(tmp_path: Path) -> None:
    x = Setup()
    exact, mixed = x.module(), x.module()
    fit(tmp_path, exact, x.batches())
    trainer = fit(tmp_path, mixed, x.batches(), precision="bf16-mixed")
    assert trainer.callback_metrics["train_loss"].isfinite()
    assert {p.dtype for p in mixed.student.parameters()} == {torch.float32}
    assert 0 < difference(exact.student, mixed.student) < 1e-2


def test_logged_statistics_by_hand(tmp_path: Path) -> None:
    """One row is unlabelled and one ignored; float64, from the equations."""
    x = Setup()
    x.labels[0], x.labels[1] = -1, -100
    metrics = fit(tmp_path, x.module(), x.batches()).callback_metrics
    counts, labelled = x.labels != -100, x.labels >= 0
    student, teacher = x.student(x.x).double(), x.teacher(x.x).double()
    y = x.labels[labelled, None]
    p, log_s = teacher.softmax(-1), student.log_softmax(-1)
    q = calibrate(teacher, x.labels, CUDLoss().options.calibration)
    moved = (q - p).clamp(min=0).sum(-1)
    wanted = {
        "loss": CUDLoss()(student, teacher, x.labels),
        "teacher_confidence": p[counts].amax(-1).mean(),
        "moved_mass": moved[counts].mean(),
        "label_prob": p[labelled].gather(-1, y).mean(),
        "label_prob_calibrated": q[labelled].gather(-1, y).mean(),
        "student_nll": F.nll_loss(log_s[labelled], y[:, 0]),
        "student_confidence": log_s[counts].exp().amax(-1).mean(),
        "accuracy": (log_s[labelled].argmax(-1) == y[:, 0]).double().mean(),
    }
    assert moved.max() > 0
    assert set(metrics) == {f"train_{name}" for name in wanted}
    for name, value in wanted.items():
        assert metrics[f"train_{name}"].item() == pytest.approx(value.item(), abs=1e-6), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_validation(tmp_path: Path, reduction: Any) -> None:
    """Batches of unequal rows weigh by their rows, and one with none by nothing."""
    x = Setup()
    x.labels[:5], x.labels[6] = -100, -1
    module = DistillationModule(x.student, x.teacher, CUDLoss(reduction=reduction))
    [metrics] = trainer_in(tmp_path).validate(module, x.batches(5), verbose=False)
    counts, labelled = x.labels != -100, x.labels >= 0
    total = 0.0
    for xs, labels in x.batches(5):
        loss = CUDLoss(reduction=reduction)(x.student(xs), x.teacher(xs), labels).item()
        total += loss * (int((labels != -100).sum()) if reduction == "mean" else 1)
    assert metrics["val_loss"] == pytest.approx(total / int(counts.sum()), abs=1e-6)
    right = x.student(x.x).argmax(-1) == x.labels
    assert metrics["val_accuracy"] == pytest.approx(right[labelled].float().mean().item(), abs=1e-6)


class TwoProcesses(DDPStrategy):
    """Leaves the process group, which Lightning's own strategy does for NCCL alone."""

    def teardown(self) -> None:
        super().teardown()
        leave()


@pytest.mark.processes
def test_validation_in_two_processes(tmp_path: Path) -> None:
    """7 rows count in one process and 8 in the other."""
    x = Setup()
    x.labels[3] = -100
    module = x.module()
    trainer = trainer_in(tmp_path, strategy=TwoProcesses(start_method="spawn"), devices=2)
    [metrics] = trainer.validate(module, x.batches(4), verbose=False)
    wanted = CUDLoss()(x.student(x.x), x.teacher.eval()(x.x), x.labels)
    assert metrics["val_loss"] == pytest.approx(wanted.item(), rel=1e-5)
    counts = x.labels >= 0
    right = x.student(x.x).argmax(-1) == x.labels
    assert metrics["val_accuracy"] == pytest.approx(right[counts].float().mean().item(), abs=1e-6)


def test_teacher_training(tmp_path: Path) -> None:
    x = Setup()
    module = DistillationModule(copy.deepcopy(x.student), None, DUSLoss(), optimizer=sgd)
    metrics = fit(tmp_path, module, x.batches()).callback_metrics
    plain = copy.deepcopy(x.student)
    DUSLoss()(plain(x.x), x.labels).backward()
    sgd(plain.parameters()).step()
    assert difference(module.student, plain) < 1e-6
    assert set(metrics) == {f"train_{name}" for name in ("loss", "label_prob", "entropy", "confidence", "accuracy")}


class Words(nn.Module):
    """In the manner of Hugging Face: keyword arguments, and an output with logits (B, S, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=self.table(input_ids) * attention_mask[..., None])


class NextWord(DistillationModule):
    def split(self, batch: Any) -> tuple[Any, Tensor | None]:
        inputs, labels = super().split(batch)
        assert labels is not None
        return inputs, F.pad(labels[:, 1:], (0, 1), value=-100)


def test_batches_of_hugging_face_and_the_shift_of_language_models(tmp_path: Path) -> None:
    student, teacher = Words(), Words().requires_grad_(False)
    ids, labels = torch.randint(9, (4, 7)), torch.randint(CLASSES, (4, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones(4, 7), "labels": labels}
    s, t = (model(ids, batch["attention_mask"]).logits for model in (student, teacher))
    loss, _ = DistillationModule(student, teacher, CUDLoss()).measure(batch)
    assert loss.item() == pytest.approx(CUDLoss()(s, t, labels).item(), abs=1e-6)
    loss, _ = NextWord(student, teacher, CUDLoss()).measure(batch)
    assert loss.item() == pytest.approx(CUDLoss()(s[:, :-1], t[:, :-1], labels[:, 1:]).item(), abs=1e-6)
    fit(tmp_path, NextWord(student, teacher, CUDLoss()), DataLoader([batch], batch_size=None))


def test_errors() -> None:
    x = Setup()
    with pytest.raises(
        ValueError, match=r"teacher's parameter 'weight' requires grad.*teacher.requires_grad_\(False\)"
    ):
        DistillationModule(x.student, nn.Linear(FEATURES, CLASSES), CUDLoss())
    with pytest.raises(ValueError, match=r"'weight' is the memory of the student's 'weight'.*copy.deepcopy"):
        DistillationModule(x.student, x.student, CUDLoss())
    assigned = nn.Linear(FEATURES, CLASSES)
    assigned.load_state_dict(x.student.state_dict(), assign=True)
    with pytest.raises(ValueError, match="is the memory of the student's 'weight'"):
        DistillationModule(x.student, assigned.requires_grad_(False), CUDLoss())
    for teacher, loss in ((None, CUDLoss()), (x.teacher, DUSLoss()), (x.teacher, FusedLinearCUDLoss())):
        with pytest.raises(TypeError, match=f"loss is {type(loss).__name__} and teacher .*: expected CUDLoss and a"):
            DistillationModule(x.student, teacher, loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction='none': expected 'mean' or 'sum'"):
        x.module(CUDLoss(reduction="none"))
    module = x.module()
    with pytest.raises(ValueError, match="the batch has 'x', 'y' and no 'labels': add them, or override split"):
        module.measure({"x": x.x, "y": x.labels})
    with pytest.raises(TypeError, match=r"the batch is a tuple of 3: expected a pair \(inputs, labels\)"):
        module.measure((x.x, x.x, x.labels))
    with pytest.raises(TypeError, match="the batch is a Tensor: expected a pair"):
        module.measure(x.x)
    wide = DistillationModule(nn.Linear(FEATURES, CLASSES + 3), x.teacher, CUDLoss())
    with pytest.raises(ValueError, match=f"pass num_classes={CLASSES}"):
        wide.measure((x.x, x.labels))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import cudfast; assert 'lightning' not in sys.modules", ""),
        ("sys.modules['lightning'] = None; import cudfast.integrations.lightning", "pip install 'cudfast[lightning]'"),
    ],
)
def test_without_lightning(script: str, message: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import sys; {script}"], capture_output=True, text=True)
    assert message in run.stderr
    assert run.returncode == (1 if message else 0)


def test_example() -> None:
    pytest.importorskip("examples.trainer_lightning", reason="needs the source tree").main()
