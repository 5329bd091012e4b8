"""The suite on every torch that is promised: `make versions`, or python3 tests/versions.py [NAME ...].

For each version: an environment in build/versions/NAME with torch and its dependencies, cudfast built and installed in
it, and a part of the suite on the installed package, from a folder without the sources. A failing version does not end
the run. The table at the end is the one in docs/versions.md; the exit code is 1 if a version failed.

Needs a network, and up to 6 GB for each environment where torch is a CUDA build. What has passed is removed; KEEP=1
keeps it. TORCH_INDEX is the index that torch comes from, if not pip's own: one of CPU builds is the quickest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "versions"


class Version(NamedTuple):
    """A torch, the Python it is tried on where that is there, and what else the environment is held to."""

    torch: str
    python: str
    others: tuple[str, ...]


# Each Python and each torch at least once. Triton's interpreter before 3.7 breaks with numpy 2.4 and newer.
PROMISED = {
    "2.8": Version("torch==2.8.0", "3.10", ("triton==3.4.0", "numpy==1.26.4")),
    "2.11": Version("torch==2.11.0", "3.12", ("triton==3.6.0", "numpy<2.4")),
    "2.13": Version("torch==2.13.0", "3.11", ("triton", "numpy")),
    "newest": Version("torch", "3.13", ("triton", "numpy")),
}
TOOLS = ("cmake", "hypothesis", "pytest", "pytest-timeout", "safetensors")

# What depends on torch: autograd, compile, export, gloo, tensors without memory, files; and Triton's interpreter, the
# native kernels and the import, for the sake of Python, numpy and triton.
SUITE = (
    "test_autograd.py",
    "test_derivatives.py",
    "test_dynamic.py",
    "test_export.py",
    "test_files.py",
    "test_linear_training.py::test_compile_gives_the_numbers_of_eager",
    "test_linear_training.py::test_opcheck",
    "test_native.py",
    "test_options.py",
    "test_package.py",
    "test_projected_loss.py::test_compile",
    "test_projected_loss.py::test_every_option_reaches_the_compiled_graph",
    "test_projected_loss.py::test_linear_compile",
    "test_sharded.py",
    "test_tensors.py",
    "test_triton.py",
)
SHOWN = ("torch", "triton", "numpy")


class Row(NamedTuple):
    """What became of a version."""

    name: str
    python: str
    versions: Mapping[str, str]
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    wrong: str = ""

    @property
    def good(self) -> bool:
        return not self.wrong and self.failed == 0 and self.passed > 0


def runs(python: str) -> str | None:
    """Its version, or None: a shim of pyenv, or a Debian Python without venv, is on the path and does not work."""
    ask = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        found = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def pythons() -> dict[str, str]:
    """Version -> path of every Python from 3.10 on: this one's, the path's and pyenv's."""
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found: dict[str, str] = {}
    for minor in range(10, 14):
        paths = [path for path in (shutil.which(f"python3.{minor}"),) if path]
        for path in [*paths, *sorted(map(str, installed.glob(f"3.{minor}.*/bin/python")))]:
            if runs(path) == f"3.{minor}":
                found.setdefault(f"3.{minor}", path)
    found.setdefault(f"3.{sys.version_info[1]}", sys.executable)
    return found


def nearest(wanted: str, there: Mapping[str, str]) -> str:
    """The Python that is wanted, or the one closest to it."""
    return min(there, key=lambda version: abs(int(version.split(".")[1]) - int(wanted.split(".")[1])))


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> int:
    """Its exit code; what it prints is seen as it comes."""
    print(f"$ {' '.join(map(str, command))}", flush=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([str(part) for part in command], cwd=cwd, env={**kept, **environment}).returncode


def installed_in(python: Path) -> dict[str, str]:
    """The versions that a table shows."""
    ask = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = subprocess.run([str(python), "-c", ask], capture_output=True, text=True)
    there = json.loads(found.stdout or "{}")
    return {name: there[name] for name in SHOWN if name in there}


def tally(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a report in JUnit's format."""
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    count = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return count["tests"] - failed - count["skipped"], failed, count["skipped"]


def check(name: str, there: Mapping[str, str]) -> Row:
    """One version, from an empty folder to its row."""
    version, home = PROMISED[name], HOME / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    label = nearest(version.python, there)
    python = home / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--progress-bar", "on"]
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    (home / "build.cfg").write_text(f"[build]\nbuild_base = {home / 'build'}\n[egg_info]\negg_base = {home}\n")
    built = {"DIST_EXTRA_CONFIG": str(home / "build.cfg"), "CUDFAST_REQUIRE_NATIVE": "1"}
    built["CUDFAST_CUDA"] = os.environ.get("CUDFAST_CUDA", "0")  # has no torch in it, and takes minutes
    for step, command in (
        ("no environment", [there[label], "-m", "venv", home]),
        ("torch was not installed", [*pip, *index, version.torch]),  # the long download, so not quiet
        ("cudfast was not installed", [*pip, "--quiet", ROOT, version.torch, *version.others, *TOOLS]),
    ):
        if run(command, ROOT, **built):
            return Row(name, label, installed_in(python) if python.exists() else {}, wrong=step)
    for folder in ("tests", "examples"):  # one of the examples is a test
        shutil.copytree(ROOT / folder, home / "suite" / folder)
    shutil.copy(ROOT / "pyproject.toml", home / "suite")
    report = home / "report.xml"
    tests = [f"tests/{name}" for name in SUITE]
    run([python, "-m", "pytest", *tests, "--tb=short", f"--junit-xml={report}"], home / "suite", OMP_NUM_THREADS="1")
    if not report.exists():
        return Row(name, label, installed_in(python), wrong="pytest did not run")
    return Row(name, label, installed_in(python), *tally(report))


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line for each version."""
    lines = ["| torch | Python | triton | numpy | passed | failed | skipped |", "|---|---|---|---|---:|---:|---:|"]
    for row in rows:
        torch = row.versions.get("torch", row.name) + (f": {row.wrong}" if row.wrong else "")
        others = [row.versions.get(name, "–") for name in SHOWN[1:]]
        cells = [torch, row.python, *others, str(row.passed), str(row.failed), str(row.skipped)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="The suite on every torch that is promised.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; default: {' '.join(PROMISED)}")
    names = parser.parse_args(arguments).names or list(PROMISED)
    if unknown := [name for name in names if name not in PROMISED]:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(PROMISED)}")
    there, rows = pythons(), []
    print(f"Pythons: {', '.join(f'{version} ({path})' for version, path in sorted(there.items()))}")
    for i, name in enumerate(names):
        print(f"\n== torch {name}, {i + 1} of {len(names)} ==", flush=True)
        start = time.monotonic()
        rows.append(row := check(name, there))
        seconds = time.monotonic() - start
        print(f"== torch {name}: {'passed' if row.good else row.wrong or 'failed'} in {seconds:.0f} s ==", flush=True)
        if row.good and not os.environ.get("KEEP"):
            shutil.rmtree(HOME / name, ignore_errors=True)
    print(f"\n{table(rows)}")
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
