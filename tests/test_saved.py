"""What users have saved: state dicts, and objects that cudfast 0.1.0 pickled.

`tests/data/pickled_0_1_0.pkl.gz` was written at commit f8ead34, version 0.1.0, from a copy of this file:
``python -m tests.test_saved`` (torch 2.13, Python 3.11). It is never written again.
"""

from __future__ import annotations

import copy
import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cudfast import (
    ClassSets,
    CUDLoss,
    CUDOptions,
    DUSLoss,
    DUSOptions,
    FusedLinearCUDLoss,
    FusedLinearDUSLoss,
    LinearOptions,
    Projection,
    WClip,
)

FILE = Path(__file__).parent / "data" / "pickled_0_1_0.pkl.gz"
N, V, D = 5, 7, 3
PER_CLASS = (DUSLoss, FusedLinearDUSLoss)
ALPHA = 0.5 + torch.arange(V) / V


def waves(*shape: int, pitch: float) -> Tensor:
    """Numbers that no generator makes."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64).reshape(shape) * pitch).sin().float() * 3


STUDENT, TEACHER, LABELS = waves(N, V, pitch=1.7), waves(N, V, pitch=2.3), torch.tensor([0, 3, 5, -1, -100])
HIDDEN, WEIGHT = waves(N, D, pitch=0.9), waves(V, D, pitch=1.1)
OTHER = {"teacher_hidden": waves(N, D, pitch=1.3), "teacher_weight": waves(V, D, pitch=0.7)}
TAUGHT = torch.where(LABELS == -1, -100, LABELS)  # what trains a teacher has labels


def sets() -> tuple[ClassSets, ClassSets]:
    """Near and wrong."""
    groups = [0, 0, 1, 1, 2, 2, 2]
    return ClassSets.from_groups(groups), ClassSets.from_lists(
        [[y for y in range(V) if groups[y] == (group + 1) % 3] for group in groups], include_label=False
    )


def projection() -> Projection:
    return Projection(*sets(), min_near_mass=0.4, max_wrong_mass=0.2, min_entropy=0.3, on_infeasible="relax")


STUDENTS: dict[str, Callable[[], Any]] = {
    "CUDLoss": CUDLoss,
    "CUDLoss, every option": lambda: CUDLoss(
        3.0,
        0.6,
        0.4,
        calibration=WClip(0.3, 0.9),
        ignore_index=-1,
        unlabeled_index=-100,
        reduction="sum",
        num_classes=6,
    ),
    "CUDLoss, plain": lambda: CUDLoss(calibration=None, reduction="none", save="state"),
    "CUDLoss, projection": lambda: CUDLoss(calibration=projection()),
}
TEACHERS: dict[str, Callable[[], Any]] = {
    "DUSLoss": DUSLoss,
    "DUSLoss, every option": lambda: DUSLoss(
        0.5, 0.7, 0.2, gamma=2.0, gate_threshold=0.4, gate_scale=0.5, gate_power=2.0, differentiate_gate=True
    ),
    "DUSLoss, alpha": lambda: DUSLoss(gamma=2.0, alpha=ALPHA.clone()),
}
FUSED_STUDENTS: dict[str, Callable[[], Any]] = {
    "FusedLinearCUDLoss": FusedLinearCUDLoss,
    "FusedLinearCUDLoss, every option": lambda: FusedLinearCUDLoss(
        4.0, student_logit_scale=0.5, student_logit_softcap=9.0, teacher_logit_softcap=8.0, memory_budget=1 << 20
    ),
}
FUSED_TEACHERS: dict[str, Callable[[], Any]] = {
    "FusedLinearDUSLoss": FusedLinearDUSLoss,
    "FusedLinearDUSLoss, alpha": lambda: FusedLinearDUSLoss(gamma=2.0, alpha=ALPHA.clone(), logit_softcap=9.0),
}
LOSSES = {**STUDENTS, **TEACHERS, **FUSED_STUDENTS, **FUSED_TEACHERS}
OPTIONS: dict[str, Callable[[], Any]] = {
    "CUDOptions": lambda: CUDOptions(temperature=3.0, calibration=WClip(0.3, 0.9), reduction="sum", check_finite=True),
    "DUSOptions": lambda: DUSOptions(gamma=2.0, alpha=0.25, backend="reference"),
    "LinearOptions": lambda: LinearOptions(accumulate_dtype=torch.float64, softcap=30.0),
    "WClip": lambda: WClip(0.3, 0.9),
}


def called(name: str, loss: Any) -> Any:
    """A loss on the data above."""
    if name in STUDENTS:
        return loss(STUDENT, TEACHER, LABELS)
    if name in TEACHERS:
        return loss(STUDENT, TAUGHT)
    return loss(HIDDEN, WEIGHT, LABELS, **OTHER) if name in FUSED_STUDENTS else loss(HIDDEN, WEIGHT, TAUGHT)


def model() -> nn.ModuleDict:
    """A model beside its losses, as users save them."""
    layer = nn.Linear(D, V)
    layer.load_state_dict({"weight": WEIGHT, "bias": ALPHA})
    return nn.ModuleDict({"layer": layer, **{kind.__name__: kind(alpha=ALPHA.clone()) for kind in PER_CLASS}})


def write() -> None:
    """Makes the file, from the package of that time."""
    made = {name: make() for name, make in {**LOSSES, **OPTIONS}.items()}
    content = {name: pickle.dumps(value) for name, value in made.items()}
    content["values"] = pickle.dumps({name: called(name, made[name]) for name in LOSSES})
    content["sets"], content["projection"] = pickle.dumps(sets()), pickle.dumps(projection())
    content["statistics"] = pickle.dumps(
        (CUDLoss()(STUDENT, TEACHER, LABELS, return_stats=True)[1], DUSLoss()(STUDENT, TAUGHT, return_stats=True)[1])
    )
    for name, value in (("model", model()), ("state dict", model().state_dict())):
        torch.save(value, stream := io.BytesIO())
        content[name] = stream.getvalue()
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(gzip.compress(pickle.dumps(content)))


def stored(name: str) -> Any:
    """An object of the file."""
    content: dict[str, bytes] = pickle.loads(gzip.decompress(FILE.read_bytes()))
    if name in ("model", "state dict"):
        return torch.load(io.BytesIO(content[name]), weights_only=name == "state dict")
    return pickle.loads(content[name])


@pytest.mark.parametrize("name", LOSSES)
def test_a_pickled_loss_is_a_fresh_one(name: str) -> None:
    loss, fresh = stored(name), LOSSES[name]()
    assert repr(loss) == repr(fresh) or "projection" in name
    value = called(name, fresh)
    torch.testing.assert_close(value, stored("values")[name])
    for same in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(called(name, same), value)


@pytest.mark.parametrize("name", LOSSES)
def test_a_pickled_loss_compiles(name: str) -> None:
    torch.compiler.reset()
    value = called(name, torch.compile(stored(name), backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(value, called(name, LOSSES[name]()))


@pytest.mark.parametrize("name", OPTIONS)
def test_pickled_options_are_fresh_ones(name: str) -> None:
    options, fresh = stored(name), OPTIONS[name]()
    assert options == fresh
    assert hash(options) == hash(fresh)
    assert repr(options) == repr(fresh)


def test_pickled_sets_and_projections() -> None:
    for old, new in zip(stored("sets"), sets()):
        assert torch.equal(old.offsets, new.offsets)
        assert torch.equal(old.indices, new.indices)
        assert old.overlap(new) is not None
    assert repr(stored("projection")) == repr(projection())
    loss = CUDLoss(calibration=stored("projection"))
    assert torch.equal(loss(STUDENT, TEACHER, LABELS), CUDLoss(calibration=projection())(STUDENT, TEACHER, LABELS))


def test_pickled_statistics() -> None:
    student, teacher = stored("statistics")
    _, wanted = CUDLoss()(STUDENT, TEACHER, LABELS, return_stats=True)
    torch.testing.assert_close(student.student_nll, wanted.student_nll, equal_nan=True)
    _, wanted = DUSLoss()(STUDENT, TAUGHT, return_stats=True)
    torch.testing.assert_close(teacher.entropy, wanted.entropy, equal_nan=True)


def test_a_saved_model_goes_on_as_a_fresh_one() -> None:
    """Also in what it saves: alpha is in the state dict, though 0.1.0 left it out."""
    old, new = stored("model"), model()
    assert list(old.state_dict()) == list(new.state_dict())
    for kind in PER_CLASS:
        assert torch.equal(old[kind.__name__].alpha, ALPHA)
    assert torch.equal(old["DUSLoss"](STUDENT, TAUGHT), new["DUSLoss"](STUDENT, TAUGHT))
    new.load_state_dict(old.state_dict())


def changed() -> nn.ModuleDict:
    """A model whose values are others."""
    other = model()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.add_(1)
    return other


@pytest.mark.parametrize("metadata", [True, False])
def test_a_state_dict_without_alpha_loads(metadata: bool) -> None:
    """That of 0.1.0; a file of safetensors has no metadata, either."""
    found, other = stored("state dict"), changed()
    assert list(found) == ["layer.weight", "layer.bias"]
    assert other.load_state_dict(found if metadata else dict(found)).missing_keys == []
    assert torch.equal(other["layer"].weight, WEIGHT)
    for kind in PER_CLASS:
        assert torch.equal(other[kind.__name__].alpha, ALPHA + 1)


@pytest.mark.parametrize("kind", PER_CLASS)
def test_alpha_per_class_is_in_the_state_dict(kind: Any) -> None:
    """As the weight of nn.CrossEntropyLoss is; a number is not."""
    loss, other = kind(alpha=ALPHA.clone()), kind(alpha=torch.ones(V))
    assert list(loss.state_dict()) == ["alpha"]
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.alpha, ALPHA)
    assert not kind(alpha=2.0).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"alpha\""):
        other.load_state_dict(kind().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"alpha\""):
        kind().load_state_dict(loss.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for alpha"):
        kind(alpha=torch.ones(V + 1)).load_state_dict(loss.state_dict())


def test_alpha_within_a_model() -> None:
    found, other = model(), changed()
    assert [key for key in found.state_dict() if "alpha" in key] == ["DUSLoss.alpha", "FusedLinearDUSLoss.alpha"]
    other.load_state_dict(found.state_dict())
    for kind in PER_CLASS:
        assert torch.equal(other[kind.__name__].alpha, ALPHA)


if __name__ == "__main__":
    write()
