"""Real processes over gloo: one spawn runs many cases, since starting a process costs more than any of them."""

from __future__ import annotations

import datetime
import os
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 30.0  # seconds that a collective of the cases may take


def start(rank: int, ranks: int, folder: Path, patience: float = PATIENCE) -> None:
    """In a spawned process: joins the group."""
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=patience),
    )


def spawn(target: Callable[..., None], ranks: int, limit: float, *args: object) -> list[int | None]:
    """Exit codes of `target(rank, ranks, *args)` in so many processes; those that still run after `limit` s are killed
    (None)."""
    context = mp.get_context("spawn")
    processes: list[BaseProcess] = [context.Process(target=target, args=(r, ranks, *args)) for r in range(ranks)]
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        for process in processes:
            process.start()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [None if was_late else process.exitcode for was_late, process in zip(late, processes)]


def run_cases(rank: int, ranks: int, folder: Path, names: Sequence[str], cases: dict[str, Callable[[], None]]) -> None:
    """Every case in turn, in all ranks at once; what went wrong lies in folder/NAME.RANK. The first failure ends it."""
    for name in names:
        try:
            torch.manual_seed(0)
            cases[name]()
            wrong = ""
        except Exception:
            wrong = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(wrong)
        said: list[str] = [""] * ranks
        dist.all_gather_object(said, wrong)
        if any(said):
            return
