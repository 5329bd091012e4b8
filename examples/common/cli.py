"""How the commands of the examples begin and end."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_INTERRUPTED = 130


class CannotRunError(Exception):
    """Says what is missing or in the way, and what to do."""


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def parser(prog: str, description: str, quick: str) -> argparse.ArgumentParser:
    """The arguments that all commands take; QUICK=1 in the environment stands for --quick, which `quick` explains."""
    found = argparse.ArgumentParser(prog=prog, description=description)
    asked = os.environ.get("QUICK", "0") not in ("", "0")
    found.add_argument("--quick", action="store_true", default=asked, help=quick)
    found.add_argument("--threads", type=positive, help="threads of PyTorch (default: its own choice)")
    return found


def start_torch(threads: int | None) -> None:
    """To be called before anything else imports torch."""
    # Threads that spin while they wait make training several times slower as soon as another program runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def guarded(run: Callable[[], None], needed: Sequence[str], out: Path) -> int:
    """Return the exit code of ``run``: 0, 1 if something is missing or cannot be written, 130 after Ctrl-C."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Missing packages: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    try:
        run()
    except KeyboardInterrupt:
        print("Interrupted: no file was left half-written.", file=sys.stderr)
        return _INTERRUPTED
    except CannotRunError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"Cannot write to --out {out}: {error}; choose another folder.", file=sys.stderr)
        return 1
    return 0
