"""The losses in torchdistill's registry: its KDLoss where the two coincide, YAML, its boxes, and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cudfast
from cudfast import Projection, WClip

registry = pytest.importorskip("torchdistill.losses.registry")

from cudfast.integrations.torchdistill import CUDLoss, DUSLoss  # noqa: E402

PATHS = {
    "student_module_path": "fc",
    "student_module_io": "output",
    "teacher_module_path": "classifier",
    "teacher_module_io": "output",
}


class Setup:
    def __init__(self) -> None:
        self.student, self.teacher = torch.randn(8, 11, requires_grad=True), 3 * torch.randn(8, 11)
        self.labels = torch.randint(11, (8,))
        self.io = {"fc": {"output": self.student}}, {"classifier": {"output": self.teacher}}

    def both(self, criterion: Any, labels: Any = "given") -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and its gradient."""
        loss = criterion(*self.io, self.labels if labels == "given" else labels)
        return loss, torch.autograd.grad(loss, self.student)[0]


def build(key: str, **kwargs: Any) -> Any:
    return registry.get_mid_level_loss({"key": key, "kwargs": {**PATHS, **kwargs}})


@pytest.mark.parametrize("kwargs", [{"alpha": 0.3}, {"alpha": 0.3, "beta": 0.9}, {"alpha": 1.0, "beta": 0.5}])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_the_kd_loss_of_torchdistill(kwargs: dict[str, float], temperature: float, reduction: str) -> None:
    x = Setup()
    theirs = build("KDLoss", temperature=temperature, reduction=reduction, **kwargs)
    ours = build("CUDLoss", temperature=temperature, reduction=reduction, calibration=None, **kwargs)
    for found, wanted in zip(x.both(ours), x.both(theirs)):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_without_targets_beta_and_the_square_of_temperature_stay() -> None:
    x = Setup()
    theirs = build("KDLoss", temperature=3.0, alpha=0.2)
    ours = build("CUDLoss", temperature=3.0, alpha=0.2, calibration=None)
    torch.testing.assert_close(x.both(ours, None)[0], 0.8 * 9 * x.both(theirs, None)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "calibration", [{"budget": 0.4, "margin": 0.6}, WClip(0.4, 0.6), Projection(min_near_mass=0.5), None]
)
def test_calibration(calibration: Any) -> None:
    x = Setup()
    loss = build("CUDLoss", temperature=2.0, calibration=calibration, ignore_index=3)
    same = WClip(**calibration) if isinstance(calibration, dict) else calibration
    wanted = cudfast.CUDLoss(2.0, calibration=same, ignore_index=3)(x.student, x.teacher, x.labels)
    assert torch.equal(x.both(loss)[0], wanted)


def test_teacher_loss() -> None:
    x = Setup()
    config = {"key": "DUSLoss", "kwargs": {"student_module_path": "fc", "student_module_io": "output", "gamma": 2.0}}
    loss = registry.get_mid_level_loss(config)
    assert torch.equal(x.both(loss)[0], cudfast.DUSLoss(gamma=2.0)(x.student, x.labels))


def test_errors() -> None:
    x = Setup()
    message = (
        r"student_module_path='head' with student_module_io='output' is not in the student's io dict, which has "
        r"'fc' \(output\): add 'head' to student.forward_hook.output in the YAML, or change student_module_path"
    )
    with pytest.raises(ValueError, match=message):
        x.both(CUDLoss("head", "output", "classifier", "output"))
    with pytest.raises(ValueError, match="teacher_module_path='classifier' with teacher_module_io='input' is not in"):
        x.both(CUDLoss("fc", "output", "classifier", "input"))
    with pytest.raises(ValueError, match="the student's io dict, which has nothing: add 'fc' to"):
        DUSLoss("fc", "output")({}, {}, x.labels)
    with pytest.raises(TypeError, match="alpha='1e-1': expected a number"):
        build("CUDLoss", alpha="1e-1")
    with pytest.raises(TypeError, match=r"temperature=\.\.\.\): expected a number, got str"):
        build("CUDLoss", temperature="1e1")
    with pytest.raises(ValueError, match=r"kd_weight=-0\.5"):
        build("CUDLoss", alpha=1.5)
    x.io[1]["classifier"]["output"] = torch.randn(8, 13)
    with pytest.raises(ValueError, match="pass num_classes=11"):
        x.both(build("CUDLoss"))


BOXES = """
import sys, types
import torch
from torch import nn
from torch.utils.data import TensorDataset

def fake(name, **attributes):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(attributes)

# torchdistill's boxes import torchvision, and use nothing of it here.
for name in ("", ".datasets", ".models", ".ops", ".transforms"):
    fake("torchvision" + name)
fake("torchvision.models.densenet", _DenseBlock=0, _Transition=0)
fake("torchvision.models.resnet", BasicBlock=nn.Module, conv1x1=0)
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.training import get_training_box
from cudfast import CUDLoss

torch.manual_seed(0)
config = load_yaml_file(sys.argv[1])
import_dependencies(config["dependencies"])
labels = torch.randint(5, (200,))
x = 2 * torch.randn(5, 8)[labels] + torch.randn(200, 8)
data, where = {"train": TensorDataset(x, labels)}, (torch.device("cpu"), None, False, 1.0)
teacher, student = nn.Linear(8, 5), nn.Linear(8, 5)
distillation = lambda: get_distillation_box(teacher, student, data, config["student"], *where)
for build in (lambda: get_training_box(teacher, data, config["teacher"], *where), distillation):
    box = build()
    before = box.forward_process(x, labels).item()
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, extra in box.train_data_loader:
            box.pre_forward_process()
            box.post_forward_process(box.forward_process(batch, targets, extra))
        box.post_epoch_process()
    after = box.forward_process(x, labels)
    assert after.item() < 0.9 * before, (after, before)
assert torch.equal(after, CUDLoss()(student(x), teacher(x).detach(), labels))
"""


def test_the_boxes_of_torchdistill_run_the_yaml() -> None:
    """In a process of its own, with a stand-in for torchvision."""
    config = Path(__file__).resolve().parents[1] / "examples" / "trainer_torchdistill.yaml"
    if not config.exists():
        pytest.skip("needs the source tree")
    run = subprocess.run([sys.executable, "-c", BOXES, str(config)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import cudfast; assert 'torchdistill' not in sys.modules", ""),
        ("import cudfast.integrations.torchdistill; assert 'torchvision' not in sys.modules", ""),
        (
            "sys.modules['torchdistill'] = None; import cudfast.integrations.torchdistill",
            "pip install 'cudfast[torchdistill]'",
        ),
    ],
)
def test_what_is_imported(script: str, message: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import sys; {script}"], capture_output=True, text=True)
    assert message in run.stderr
    assert run.returncode == (1 if message else 0)


def test_example() -> None:
    accuracy = pytest.importorskip("examples.trainer_torchdistill", reason="needs the source tree").main()
    assert min(accuracy.values()) > 0.5
