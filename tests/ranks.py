"""Real processes over gloo: one spawn runs many cases, since starting a process costs more than any of them."""

from __future__ import annotations

import datetime
import gc
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300.0  # seconds that a collective may take on a machine that is busy with other things
LIMIT = 600.0  # seconds after which processes hang; less than pytest's own limit


def start(rank: int, ranks: int, folder: Path) -> None:
    """In a spawned process: joins the group."""
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )


def leave() -> None:
    """Destroys the process group, after its models are out of scope.

    DDP would wait for a process that has ended. A thread of the group that outlives the interpreter ends the process
    with SIGABRT: "terminate called without an active exception".
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def spawn(target: Callable[..., None], ranks: int, *args: object) -> list[int | None]:
    """Exit codes of `target(rank, ranks, *args)` in so many processes; those that still run after LIMIT s are killed
    (None). They are forked from a server that has imported torch and has done nothing else."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["cudfast"])
    processes: list[BaseProcess] = [context.Process(target=target, args=(r, ranks, *args)) for r in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [None if was_late else process.exitcode for was_late, process in zip(late, processes)]


def run_cases(
    rank: int, ranks: int, folder: Path, cases: dict[str, Callable[[], None]], last: Callable[[], None]
) -> None:
    """Runs every case in turn, in all ranks at once; errors are written to folder/NAME.RANK. The first failure ends it.

    last: a case after which the group cannot be used.
    """

    def run(case: Callable[[], None]) -> str:
        wrong = ""
        try:
            torch.manual_seed(0)
            case()
        except Exception:
            wrong = traceback.format_exc()
        (folder / f"{case.__name__}.{rank}").write_text(wrong)
        return wrong

    for case in cases.values():
        said: list[str] = [""] * ranks
        dist.all_gather_object(said, run(case))
        if any(said):
            return leave()
    run(last)
    os._exit(0)  # nothing can be torn down any more
