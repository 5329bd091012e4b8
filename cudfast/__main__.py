"""python -m cudfast info"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cudfast", description="Calibrated Uncertainty Distillation losses."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, backends, instruction set, threads, and a self-check")
    parser.parse_args(arguments)
    from .info import describe

    text, good = describe()
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
