"""The cases that tests/test_sharded.py runs in each of four processes."""

from __future__ import annotations

from pathlib import Path

from . import sharded_heads, sharded_logits, sharded_meshes  # noqa: F401 (each adds its cases)
from .ranks import run_cases, start
from .sharded_errors import rank_dies
from .shards import CASES as CASES


def main(rank: int, ranks: int, folder: Path) -> None:
    start(rank, ranks, folder)
    run_cases(rank, ranks, folder, CASES, last=rank_dies)
