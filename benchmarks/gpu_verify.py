"""The Triton and CUDA kernels on this GPU: checked, timed, swept, profiled and sanitized.

Everything is written as soon as it is known: lines.jsonl has a line for every fact, report.md is for people, and both
are whole whenever the run is cut off. A check that fails makes its backend's times "unproven", and the run goes on.
Exit status: 0; 1 if something failed; 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.supervise import AGAIN, die_with_parent, supervise


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.gpu_verify", description=__doc__.splitlines()[0])
    found.add_argument("--out", type=Path, default=Path("gpu_verify"), help="folder of lines.jsonl and report.md")
    found.add_argument(
        "--minutes", type=float, help="for the whole run: the last steps are dropped where they do not fit"
    )
    found.add_argument("--only", metavar="TEXT", default="", help="what has this in its name: 'racecheck', 'cuda: '")
    found.add_argument(
        "--stand-in", action="store_true", help="run small shapes on the CPU instead, to try the program"
    )
    found.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    found.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    found.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    return found


def work(asked: argparse.Namespace) -> int:
    """In a process of its own: all steps."""
    die_with_parent()
    import torch

    from benchmarks.gpu import place, steps
    from benchmarks.gpu.plan import steps as steps_of
    from benchmarks.gpu.report import PAGE, Log, failed

    if not asked.stand_in and not torch.cuda.is_available():
        print("gpu-verify: torch sees no CUDA or ROCm GPU here; nothing was verified", file=sys.stderr)
        return 2
    here = place.stand_in() if asked.stand_in else place.gpu()

    def lost() -> bool:
        try:
            if not here.stand_in:
                torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    log = Log(asked.out, resume=asked.resume)
    todo = steps_of(here, asked.out)
    try:
        steps.run(todo, here, log, minutes=asked.minutes, only=asked.only, begun=asked.begun, lost=lost)
    except steps.LostError:
        return AGAIN
    print(f"Written: {asked.out / PAGE}")
    return 1 if failed(log.records) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    asked = parser().parse_args(given)
    if asked.minutes is not None and not asked.minutes > 0:
        parser().error(f"--minutes {asked.minutes:g}: expected a positive number")
    if asked.stand_in:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDFAST_CUDA_EMULATE": "1"}  # before anything imports triton
    if asked.worker:
        return work(asked)
    from benchmarks.gpu.report import LINES

    worker = [sys.executable, "-m", "benchmarks.gpu_verify", "--worker", "--begun", str(time.time())]
    return supervise([*worker, *given], asked.out / LINES)


if __name__ == "__main__":
    sys.exit(main())
