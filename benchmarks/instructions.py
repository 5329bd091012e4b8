"""Instructions of the native kernels, counted by valgrind: a regression gate without noise.

    python -m benchmarks.instructions [--write]

Counts depend on the compiler and on the instruction set, and on nothing else. They are kept in instructions.json with
the compiler's name. If another compiler built the kernels they cannot be compared, and without valgrind nothing is
counted; both cases print a message. A change beyond TOLERANCE, in either direction, fails until `--write` has recorded
it; the commit gives the reason. valgrind does not run AVX-512: the baseline and AVX2 are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("instructions.json")
BUILD = ROOT / "build" / "core"
TOLERANCE = 0.03


class Count(NamedTuple):
    """Of one case on one instruction set."""

    isa: str
    case: str
    per_logit: float

    @property
    def key(self) -> str:
        return f"{self.isa}: {self.case}"


def build() -> Path:
    """The driver, built as `make core` builds the kernels."""
    programs = Path(sys.executable).parent
    cmake, ninja = (str(programs / name) if (programs / name).exists() else name for name in ("cmake", "ninja"))
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), "-DCUDFAST_TESTS=ON", "-DCUDFAST_WERROR=ON"]
    subprocess.run([*configure, f"-DCMAKE_MAKE_PROGRAM={ninja}"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(BUILD), "--target", "count_core"], check=True, stdout=subprocess.DEVNULL)
    return BUILD / "count_core"


def compiler() -> str:
    """Name and version of what CMake chose."""
    cache = (BUILD / "CMakeCache.txt").read_text()
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    assert found, "CMake names its compiler"
    return subprocess.run([found[1], "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def total(dump: Path) -> int:
    """Instructions in one dump of callgrind."""
    found = re.search(r"^(?:totals|summary): (\d+)", dump.read_text(), re.MULTILINE)
    assert found, f"{dump} has no total"
    return int(found[1])


def count(program: Path, valgrind: str) -> list[Count]:
    """Every case, in one run."""
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder, "count")
        tool = ["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=counted", "--dump-after=counted"]
        run = [valgrind, "-q", *tool, f"--callgrind-out-file={dumps}", str(program)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True, env=env)
        lines = [line.split("\t") for line in done.stdout.splitlines()]
        return [
            Count(isa, case, total(dumps.with_name(f"count.{i}")) / int(logits))
            for i, (isa, case, logits) in enumerate(lines, 1)
        ]


def differences(kept: dict[str, float], found: list[Count]) -> list[str]:
    """What a reader must explain."""
    now = {c.key: c.per_logit for c in found}
    missing = [f"{key}: in one of both lists only" for key in sorted(set(kept) ^ set(now))]
    return missing + [
        f"{key}: {kept[key]:.3f} -> {now[key]:.3f} instructions a logit ({now[key] / kept[key] - 1:+.1%})"
        for key in now
        if key in kept and abs(now[key] / kept[key] - 1) > TOLERANCE
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep what is counted now")
    asked = parser.parse_args(arguments)
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print(
            "instructions: NOT CHECKED, valgrind is not installed (Debian: apt-get install valgrind)", file=sys.stderr
        )
        return 2 if asked.write else 0
    program = build()
    built_by = compiler()
    kept: dict[str, Any] = {"compiler": "", "per_logit": {}}
    if KEPT.exists():
        kept = json.loads(KEPT.read_text())
    if not asked.write and kept["compiler"] != built_by:
        print(f"instructions: NOT COMPARABLE, counted with {kept['compiler']}, here is {built_by}", file=sys.stderr)
        return 0
    found = count(program, valgrind)
    changed = differences(kept["per_logit"], found)
    if asked.write:
        content = {"compiler": built_by, "per_logit": {c.key: round(c.per_logit, 4) for c in found}}
        KEPT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"instructions: {len(found)} counts with {built_by}, {len(changed)} beyond {TOLERANCE:.0%}")
    for line in changed:
        print(f"  {line}")
    return 1 if changed and not asked.write else 0


if __name__ == "__main__":
    sys.exit(main())
