"""Fine-tunes a teacher and distils it with the losses that trainer_torchdistill.yaml names; seconds on a CPU.

torchdistill's boxes, which run the same file, need torchvision; here its registry builds the losses for a plain loop.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdistill.common.main_util import import_dependencies
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.losses.registry import get_high_level_loss

CLASSES, FEATURES = 20, 8
Rows = tuple[Tensor, Tensor]


def train(model: nn.Module, teacher: nn.Module | None, config: dict[str, Any], rows: Rows) -> None:
    """As a box does: the io dicts hold each model's output at the path "."."""
    criterion = get_high_level_loss(config["criterion"])
    optimizer = getattr(torch.optim, config["optimizer"]["key"])(model.parameters(), **config["optimizer"]["kwargs"])
    for _ in range(config["num_epochs"]):
        for batch in torch.randperm(len(rows[0])).split(config["train_data_loader"]["kwargs"]["batch_size"]):
            x, labels = rows[0][batch], rows[1][batch]
            io: dict[str, Any] = {"student": {".": {"output": model(x)}}, "teacher": {}}
            if teacher is not None:
                with torch.no_grad():
                    io["teacher"] = {".": {"output": teacher(x)}}
            loss = criterion(io, {}, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> dict[str, float]:
    """Held-out accuracy of the teacher and of the student."""
    torch.manual_seed(0)
    config = load_yaml_file(str(Path(__file__).with_suffix(".yaml")))
    import_dependencies(config["dependencies"])
    labels = torch.randint(CLASSES, (3000,))
    x = 1.5 * torch.randn(CLASSES, FEATURES)[labels] + torch.randn(3000, FEATURES)
    teacher = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    student = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    train(teacher, None, config["teacher"], (x[1000:], labels[1000:]))
    train(student, teacher.eval(), config["student"], (x[1000:], labels[1000:]))
    models = {"teacher": teacher, "student": student}
    accuracy = {
        name: (model(x[:1000]).argmax(-1) == labels[:1000]).float().mean().item() for name, model in models.items()
    }
    print(", ".join(f"{name}: held-out accuracy {value:.3f}" for name, value in accuracy.items()))
    return accuracy


if __name__ == "__main__":
    main()
