"""python -m cudfast info | bench | gpu-model"""

from __future__ import annotations

import argparse
import json
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cudfast", description="Calibrated Uncertainty Distillation losses."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, compiler, backends and why one is missing, and a self-check")
    info.add_argument("--json", action="store_true", help="JSON instead of text")
    model = commands.add_parser("gpu-model", help="what the kernels should take on GPUs: a model, no GPU needed")
    model.add_argument("--json", action="store_true", help="JSON instead of a table")
    model.add_argument("--gpu", nargs="+", default=[], metavar="NAME", help="H100, for example; default: all")
    bench = commands.add_parser("bench", help="times and memory of the losses beside PyTorch's, on this machine")
    try:
        from .bench import command
    except ImportError as error:
        if error.name != "rich":
            raise
        bench.set_defaults(missing="bench draws its table with rich: pip install cudfast[bench]")
    else:
        command.arguments(bench)
    asked = parser.parse_args(arguments)
    if asked.command == "bench":
        if "missing" in asked:
            print(asked.missing, file=sys.stderr)
            return 2
        return command.main(asked)
    if asked.command == "gpu-model":
        from .backends import load

        if isinstance(reason := load("triton"), str):
            print(reason, file=sys.stderr)
            return 2
        from .inspect.gpu_model import main as model_main

        try:
            print(model_main(asked.json, asked.gpu))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    from .inspect.info import describe, report

    found = report()
    print(json.dumps(found, indent=2) if asked.json else describe(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
