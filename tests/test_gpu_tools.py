"""What gpu_verify times, sweeps and asks other programs, with clocks and programs that tests put in their place."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks.gpu import clocks, place, steps, sweep, times, tools, warm
from benchmarks.gpu.clocks import Calls
from benchmarks.gpu.report import Log
from cudfast import backends
from cudfast.backends import tuning
from cudfast.bench.shapes import Shape
from cudfast.options import BackendName

CUDA = not backends.available()["cuda"]
NAMES: list[BackendName] = ["cuda", "triton"] if CUDA else ["triton"]


class Fixed(clocks.HostClock):
    """Makes every call once, and says what a test wants to hear."""

    def __init__(self, answer: Callable[[], float] = lambda: 2.0) -> None:
        self.answer = answer

    def called(self, calls: Calls) -> float:
        for call in calls:
            call()
        return self.answer()

    def replayed(self, calls: Calls) -> float:
        return self.called(calls) / 2


HERE = dataclasses.replace(place.stand_in(), clock=Fixed())


def test_every_way_is_timed_beside_the_floor(tmp_path: Path) -> None:
    log = Log(tmp_path, echo=False)
    (item,) = times.items(HERE)
    steps.run_item("times", item, log)
    assert log.of("done")[0]["verdict"] == "ok"
    found = {r["name"]: r for r in log.of("time")}
    ways = ["given gradient", "fresh gradient", 'save="state"', "DUSLoss, given gradient", "DUSLoss, fresh gradient"]
    assert list(found) == ["torch.add", "torch.neg", *(f"{name}, {way}" for name in NAMES for way in ways)]
    given = found["triton, given gradient"]
    assert (given["milliseconds"], given["called_ms"], given["of_floor"], given["floor"]) == (1, 2, 1, "torch.add")
    assert given["gigabytes_per_second"] == pytest.approx(3 * 4 * 77 * 4 / 1e6)
    assert found["triton, DUSLoss, given gradient"]["floor"] == "torch.neg"
    assert found["torch.add"]["of_floor"] is None
    rotating = times.batches(HERE, Shape(4, 77), torch.float32)
    assert len({b.student.data_ptr() for b in rotating}) == 2
    tight = dataclasses.replace(HERE, memory=8 * 4 * 77 * 4)
    assert len(times.batches(tight, Shape(4, 77), torch.float32)) == 1
    assert times.race(dataclasses.replace(HERE, memory=1), Shape(4, 77), torch.float32, [], log) is not None


def test_a_way_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    def broken(batch: times.Batch) -> Callable[[], object]:
        return lambda: 1 / 0

    log = Log(tmp_path, echo=False)
    ways = [times.Way("peer", broken), *times.floors()]
    verdict = times.race(HERE, Shape(4, 77), torch.float32, ways, log)
    assert verdict == "left out: peer: ZeroDivisionError: division by zero"
    assert [r["name"] for r in log.of("time")] == ["torch.add", "torch.neg"]
    with pytest.raises(RuntimeError, match="ours: ZeroDivisionError"):
        times.race(HERE, Shape(4, 77), torch.float32, [times.Way("ours", broken, "cuda")], log)


def test_peers_are_called_from_python(tmp_path: Path) -> None:
    log = Log(tmp_path, echo=False)
    for item in times.peer_items(HERE):
        steps.run_item("peers", item, log)
    assert [(r["name"], r["called_ms"], r["milliseconds"]) for r in log.of("time")] == [("eager PyTorch", 2, 2)]
    names = [way.name for way in times.peers()]
    assert names == ["eager PyTorch", "torch.compile", "Liger KL (no clip, no CE)", "Liger JSD (no clip, no CE)"]


def test_a_graph_is_warmed_up_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a GPU, on a torch.cuda that writes down what it is asked."""
    asked: list[str] = []

    class Context:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            asked.append(f"begin {self.name}")

        def __exit__(self, *_: object) -> None:
            asked.append(f"end {self.name}")

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.now += 3.0
            self.at = Event.now

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    graph = types.SimpleNamespace(replay=lambda: asked.append("replay"), reset=lambda: asked.append("reset"))
    fake: dict[str, Any] = {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: Context("warm"),
        "CUDAGraph": lambda: graph, "graph": lambda g: Context("graph"), "Event": Event, "synchronize": lambda: None,
    }  # fmt: skip
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clock = clocks.GraphClock(seconds=0.03, fewest=5, most=20)
    calls = [lambda: asked.append("a"), lambda: asked.append("b")]
    assert clock.replayed(calls) == 1.5  # 3 ms for both
    warm = ["begin warm", "a", "a", "b", "end warm"]
    assert asked == [*warm, "begin graph", "a", "b", "end graph", *["replay"] * 12, "reset"]
    asked.clear()
    assert clock.called(calls) == 1.5
    assert asked == ["a", "b"] * 12


@pytest.mark.parametrize("backend", NAMES)
def test_a_sweep_keeps_the_fastest_plan_that_is_right(
    backend: BackendName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([4.0, 3.0, 1.0])
    monkeypatch.setattr(sweep, "few_rows", lambda where, shape: shape)
    gpu = dataclasses.replace(HERE, clock=Fixed(lambda: next(answers)))
    right, tried = sweep.right, sweep.plans(backend, small=True)

    def last_is_wrong(*arguments: Any) -> None:
        right(*arguments)
        if tuning.tuned(backend, torch.device("cpu"), "student", 4, 77) == tuning.parsed(backend, tried[2]):
            raise AssertionError("far from float64")

    monkeypatch.setattr(sweep, "right", last_is_wrong)
    monkeypatch.setattr(place.Place, "stand_in", property(lambda self: False))
    monkeypatch.setattr(sweep, "plans", lambda backend, small: tried)
    monkeypatch.setattr(tuning, "target", lambda device: "sm_90")
    log = Log(tmp_path, echo=False)
    assert sweep.sweep(gpu, Shape(4, 77), backend, "student", tmp_path, log) is None
    found = [(r["plan"], r["milliseconds"], r["verdict"]) for r in log.of("sweep")]
    assert found == [("default", 2.0, "ok"), (tried[1], 1.5, "ok"), (tried[2], 0.0, "AssertionError: far from float64")]
    (entry,) = json.loads((tmp_path / "tuning.json").read_text())
    assert entry["plan"] == tuning.parsed(backend, tried[1])
    assert tuning.key(entry) == (backend, "sm_90", "student", 4, 128)
    answers = iter([4.0, 3.99, 1.0])  # gains less than the noise
    (tmp_path / "tuning.json").unlink()
    sweep.sweep(gpu, Shape(4, 77), backend, "student", tmp_path, log)
    assert not (tmp_path / "tuning.json").exists()


def test_the_plans_of_a_sweep() -> None:
    triton, cuda = sweep.plans("triton"), sweep.plans("cuda")
    assert len(set(triton)) == 1 + 3 * 4 * 2
    assert len(set(cuda)) == 1 + 5 * 3
    for backend, found in (("triton", triton), ("cuda", cuda)):
        for text in found:
            tuning.parsed(backend, text)
    assert len(sweep.jobs(dataclasses.replace(HERE, swept=(Shape(4, 77),)))) == 2 * 3


def test_what_compiles_beside_the_checks(tmp_path: Path) -> None:
    ran: list[int] = []
    assert warm.run([lambda: ran.append(1), lambda: 1 / 0, lambda: ran.append(2)]) == 1
    assert ran == [1, 2]
    assert len(warm.jobs(HERE)) > len(sweep.jobs(HERE))
    workers = warm.Workers(0)
    assert workers.start(Log(tmp_path, echo=False)) == "left out: the interpreter compiles nothing"
    assert workers.wait(1) is None


def put(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """A program of this name, first on the PATH."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("says", "code", "verdict"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "ok"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, "FAILED: ==="),
        ("========= ERROR SUMMARY: 3 errors", 9, "FAILED: ==="),
        ("Target application terminated before first instrumented API call", 0, "FAILED: Target"),
    ],
)
def test_a_sanitizer_is_believed_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int, verdict: str
) -> None:
    asked = f"echo \"$PYTORCH_NO_CUDA_MEMORY_CACHING $@\" >>{tmp_path}/asked\necho '{says}'\nexit {code}"
    put(tmp_path, monkeypatch, "compute-sanitizer", asked)
    log = Log(tmp_path, echo=False)
    first, *_ = tools.sanitizer_items(HERE)
    steps.run_item("sanitizers", first, log)
    *found, whole = log.of("done")
    assert {r["what"] for r in found} == {
        f"{backend}: compute-sanitizer {tool}, bfloat16" for backend, tool in tools.FIRST if backend in NAMES
    }
    assert all(r["verdict"].startswith(verdict) and r["proves"] for r in found)
    assert whole["verdict"] == ("ok" if verdict == "ok" else "left out: see the lines before")
    lines = (tmp_path / "asked").read_text().splitlines()
    assert len(lines) == len(found)
    (one,) = (line for line in lines if "racecheck" in line and "triton" in line)
    filters = " ".join(f"--kernel-name kernel_substring={name}" for name in tools.KERNELS["triton"])
    options = f"1 --tool racecheck --error-exitcode 9 --report-api-errors no {filters} "
    assert one.startswith(options)
    assert one.endswith(" -m benchmarks.gpu.kernels triton bfloat16")


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    """The limit is passed at once; the sleep is what would be left behind, and holds the pipe."""
    assert tools.finished(["sh", "-c", "sleep 1000 & sleep 1000"], 0) == (None, "")


CSV = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","row_kernel","DRAM Throughput","%","71.5"
"0","row_kernel","Registers Per Thread","register/thread","92"
"0","row_kernel","Something else","%","1"
"""


def test_profiles_are_read_from_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, "ncu", f"echo \"$@\" >{tmp_path}/asked\ncat <<'END'\n{CSV}END")
    log = Log(tmp_path, echo=False)
    assert tools.profile("cuda", 4096, 32_000, log) is None
    (found,) = log.of("profile")
    assert found["metrics"] == {"DRAM Throughput": "71.5 %", "Registers Per Thread": "92 register/thread"}
    assert "row_kernel | DRAM Throughput: 71.5 %" in (tmp_path / "report.md").read_text()
    asked = (tmp_path / "asked").read_text()
    assert "--kernel-name regex:row_kernel " in asked
    assert asked.endswith("-m benchmarks.gpu.kernels cuda bfloat16 4096 32000\n")
    put(tmp_path, monkeypatch, "ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1")
    assert tools.profile("cuda", 4096, 32_000, log) == "left out: ncu ended with 1: ==ERROR== ERR_NVGPUCTRPERM"


def test_the_facts_name_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, monkeypatch, "nvidia-smi", "echo 'driver_version, clocks'; echo '580.1, 1980 MHz'")
    log = Log(tmp_path, echo=False)
    assert tools.facts(HERE, log) is None
    (facts,) = log.of("facts")
    assert facts["driver"] == "driver_version, clocks; 580.1, 1980 MHz"
    assert facts["backend triton"].strip().startswith("available")
    for program in ("nvidia-smi", "ncu", "compute-sanitizer"):
        (tmp_path / program).unlink(missing_ok=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.driver() == "nvidia-smi is not on the PATH"
    assert tools.sanitized("cuda", "memcheck", "bfloat16") == "left out: compute-sanitizer is not on the PATH"
    assert tools.profile("cuda", 1, 1, log) == "left out: ncu is not on the PATH"
