"""The package besides the losses: the command line, leaks, the import."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import torch

import cudfast
from cudfast import CUDLoss, DUSLoss
from cudfast.__main__ import main
from cudfast.backends import native
from cudfast.inspect import info


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["cudfast"].strip() == cudfast.__version__
    for name in ("native", "reference"):
        assert re.fullmatch(r" *available, self-check ok in [\d.e+]+ ms", lines[f"backend {name}"])
    assert lines["instruction set"].strip().startswith(f"{native.isa()}, compared with baseline in ")
    assert re.match(r"(g\+\+|clang) \d+\.", lines["compiler"].strip())


def test_info_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDFAST_TEST", "1")
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["cudfast"] == cudfast.__version__
    assert list(found["backends"]) == list(info.backends.NAMES)
    for backend in found["backends"].values():
        assert backend.keys() == (
            {"available", "self_check", "self_check_ms"} if backend["available"] else {"available", "reason"}
        )
    assert found["backends"]["native"]["self_check"] == "ok"
    assert found["backends"]["native"]["self_check_ms"] > 0
    assert found["native"]["instruction_set"] == native.isa()
    assert found["native"]["instruction_set_check_ms"] > 0
    assert found["variables"]["CUDFAST_TEST"] == "1"
    assert info.describe(found).splitlines()[0].split() == ["cudfast", cudfast.__version__]


def test_info_says_why_a_backend_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info.backends, "load", lambda name: "no C++ compiler found (looked for c++, g++, clang++)")
    assert main(["info"]) == 0
    assert re.search(r"backend native +missing: no C\+\+ compiler found", capsys.readouterr().out)
    assert info.report()["backends"]["native"] == {"available": False, "reason": info.backends.load("native")}


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_KNOWN_LOSS", 1.0)
    found = info.report()
    assert not found["ok"]
    assert "wrong: got 1.348705" in info.describe(found)
    assert main(["info"]) == 1


def copied_tree(folder: Path) -> tuple[Path, list[str]]:
    """A copy of the repository that any setuptools reads, and its files."""
    pytest.importorskip("setuptools")
    root, copied = Path(cudfast.__file__).parents[1], folder / "tree"
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("needs the repository")
    files = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, copied / name)
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:  # does not accept names of licences
        project = (copied / "pyproject.toml").read_text()
        (copied / "pyproject.toml").write_text(re.sub(r"^license.*\n", "", project, flags=re.MULTILINE))
    return copied, files


def test_the_source_distribution_is_whole(tmp_path: Path) -> None:
    """What a build reads, what it installs, and the tests: C++ ones can be configured."""
    copied, files = copied_tree(tmp_path)
    make = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(make, cwd=copied, capture_output=True, check=True)
    (archive,) = tmp_path.glob("cudfast-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    kept = (
        "csrc/",
        "cmake/",
        "cudfast/",
        "tests/",
        "CMakeLists.txt",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
    )
    assert [name for name in files if name.startswith(kept) and not (source / name).exists()] == []
    configure = [sys.executable, "-m", "cmake", "-S", str(source), "-B", str(tmp_path / "build"), "-DCUDFAST_TESTS=ON"]
    found = subprocess.run(configure, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("asked", "archs", "text"), [("90 100 75 75", "75;90;100", "90"), ("86 80 86", "80;86", "80")])
def test_architectures_in_any_order(tmp_path: Path, asked: str, archs: str, text: str) -> None:
    """Sorted, each once; and PTX of the highest step. The project around cmake/cuda.cmake is configured, not built."""
    root = Path(cudfast.__file__).parents[1]
    if not (root / "cmake" / "cuda.cmake").exists():
        pytest.skip("needs the source tree")
    (tmp_path / "csrc").symlink_to(root / "csrc")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(around LANGUAGES CXX)\n"
        f'include({root}/cmake/cuda.cmake)\nmessage(STATUS "archs ${{CUDFAST_CUDA_ARCHS}}, flags ${{cuda_flags}}")\n'
    )
    configure = [sys.executable, "-m", "cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")]
    found = subprocess.run([*configure, f"-DCUDFAST_CUDA_ARCHS={asked}"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    line = re.search(r"archs (.*), flags (.*)", found.stdout)
    assert line, found.stdout
    assert line[1] == archs
    assert re.findall(r"code=sm_(\d+)", line[2]) == archs.split(";")
    assert re.findall(r"arch=compute_(\d+),code=compute_(\d+)", line[2]) == [(text, text)]


@pytest.mark.parametrize("isa", ["baseline", "avx1024"])
def test_isa_from_the_environment(isa: str) -> None:
    script = "from cudfast.backends import native; print(native.isa())"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "CUDFAST_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0
    if isa == "baseline":
        assert run.stdout.strip() == "baseline"
        assert not run.stderr
    else:
        assert "CUDFAST_ISA=avx1024 cannot run here; expected one of: baseline" in run.stderr


def test_without_the_native_core() -> None:
    """As after an installation without a compiler: the loss works, warns once, and info gives the reason."""
    script = """
import sys
sys.modules["cudfast._native"] = None
import torch, cudfast
from cudfast.__main__ import main
for _ in range(2):
    print(cudfast.CUDLoss()(torch.zeros(2, 5), torch.zeros(2, 5)).item())
main(["info"])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("0.0\n0.0\n")
    assert "missing: the native core was not built when cudfast was installed: it is not in the package" in run.stdout
    assert run.stderr.count("CPU tensors go through the reference backend") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """cudfast is installed all the same, and the first loss on a CPU says once what failed and what to do."""
    copied, _ = copied_tree(tmp_path)
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'dispatch.cpp:108:76: error: invalid cpu feature' >&2\nexit 1\n")
    compiler.chmod(0o755)
    (copied / "pybind11.py").write_text("def get_cmake_dir(): return ''\n")
    environment = {**os.environ, "CXX": str(compiler), "CUDFAST_CUDA": "0", "CUDFAST_REQUIRE_NATIVE": "0"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(copied)}
    build = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(build, cwd=copied, capture_output=True, check=True, env=environment)
    script = """
import sys
sys.modules["cudfast._native"] = None  # that of an editable installation would be found
import torch, cudfast
for device in ("cpu", "cpu:0", "cpu"):
    cudfast.CUDLoss()(*torch.zeros(2, 2, 5, device=device))
cudfast.DUSLoss()(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))
"""
    environment["PYTHONPATH"] = str(tmp_path / "lib")
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    expected = (
        "CPU tensors go through the reference backend, which is much slower: the native core was not built when "
        "cudfast was installed: the build failed (dispatch.cpp:108:76: error: invalid cpu feature): install g++ or "
        "clang++, or set CXX to another compiler, then install cudfast again with pip install --force-reinstall "
        "--no-deps --no-cache-dir"
    )
    assert run.stderr.count(expected) == run.stderr.count("reference backend") == 1, run.stderr


def test_losses_travel() -> None:
    """Copies, pickles and spawned workers: nothing native hangs on to a loss that has been called."""
    student, teacher, labels = torch.randn(3, 9), torch.randn(3, 9), torch.tensor([1, 2, 3])
    for loss, arguments in (
        (CUDLoss(3.0), (student, teacher, labels)),
        (DUSLoss(alpha=torch.rand(9)), (student, labels)),
    ):
        value = loss(*arguments)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert other.options == loss.options
            assert torch.equal(other(*arguments), value)


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_a_thousand_calls_leak_nothing() -> None:
    student, teacher, labels = torch.randn(8, 3000), torch.randn(8, 3000), torch.randint(3000, (8,))

    def calls(count: int) -> None:
        for i in range(count):
            leaf = student.clone().requires_grad_()
            loss = CUDLoss(save=("state", "gradient")[i % 2])(leaf, teacher, labels)
            loss.backward()
            DUSLoss()(leaf, labels, return_stats=True)[0].backward()

    calls(50)
    gc.collect()
    tracemalloc.start()
    before, traced = resident(), tracemalloc.get_traced_memory()[0]
    calls(1000)
    gc.collect()
    grown, traced = resident() - before, tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert traced < 200_000
    assert grown < 8_000_000  # a leak of one gradient a call would be 96 MB


def test_the_import_brings_no_trainer() -> None:
    script = """
import sys, cudfast
print([name for name in ("transformers", "trl", "lightning", "torchdistill") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
