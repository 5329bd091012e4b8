"""The losses over a process group, in four real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cudfast import CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss

from . import sharded_cases
from .ranks import spawn

RANKS = 4


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the errors of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    codes = spawn(sharded_cases.main, RANKS, folder)
    (folder / "codes").write_text(str(codes))
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("name", [*sharded_cases.CASES, "rank_dies"])
def test_in_every_rank(outcome: Path, name: str) -> None:
    for rank in [r for r in range(RANKS) if r != 2] if name == "rank_dies" else range(RANKS):
        found = outcome / f"{name}.{rank}"
        assert found.exists(), f"rank {rank} did not come this far; exit codes {(outcome / 'codes').read_text()}"
        assert not (wrong := found.read_text()), f"rank {rank}:\n{wrong}"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"process_group": "tp"}, TypeError, "process_group: expected a torch.distributed.ProcessGroup"),
        ({"class_offset": 5}, ValueError, "class_offset=5 without process_group: expected both, or neither"),
    ],
)
def test_no_group(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    for loss in (CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss):
        with pytest.raises(error, match=words):
            loss(**arguments)


def test_sequences_that_are_cut_over_nothing() -> None:
    with pytest.raises(ValueError, match="sequence_sharded=True without process_group"):
        FusedLinearDUSLoss(sequence_sharded=True)(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, dtype=torch.int64))
