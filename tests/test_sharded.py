"""The losses over a process group, in four real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import sharded_cases
from .ranks import spawn

RANKS = 4


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every case has left what went wrong."""
    folder = tmp_path_factory.mktemp("ranks")
    codes = spawn(sharded_cases.main, RANKS, 240, folder)
    (folder / "codes").write_text(str(codes))
    return folder


@pytest.mark.parametrize("name", [*sharded_cases.CASES, "rank_dies"])
def test_in_every_rank(outcome: Path, name: str) -> None:
    for rank in [r for r in range(RANKS) if r != 2] if name == "rank_dies" else range(RANKS):
        found = outcome / f"{name}.{rank}"
        assert found.exists(), f"rank {rank} did not come this far; exit codes {(outcome / 'codes').read_text()}"
        assert not (wrong := found.read_text()), f"rank {rank}:\n{wrong}"
