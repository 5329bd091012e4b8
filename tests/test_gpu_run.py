"""How gpu_verify goes on, ends and is cut off; no GPU is there, and no clock is looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks import gpu_verify
from benchmarks.gpu import place, plan, report, steps, supervise
from benchmarks.gpu.report import Log, Record
from benchmarks.gpu.steps import Item, Step

ROOT = Path(__file__).parents[1]
HERE = place.stand_in()


def items(*found: Item) -> Any:
    return lambda where: iter(found)


def fine(log: Log) -> None:
    return None


def wrong(log: Log) -> None:
    raise ValueError("1 | 2")


def done(log: Log) -> list[tuple[str, str]]:
    return [(r["what"], r["verdict"]) for r in log.of("done")]


def time_of(backend: str, name: str = "way") -> dict[str, Any]:
    return {
        "shape": "2 x 3", "dtype": "bfloat16", "name": f"{backend}, {name}", "backend": backend, "milliseconds": 0.5,
        "gigabytes_per_second": 1234.0, "floor": "torch.add", "of_floor": 0.8, "called_ms": None, "peak_bytes": 2e6,
    }  # fmt: skip


def test_a_failed_check_marks_its_backends_times_and_the_run_goes_on(tmp_path: Path) -> None:
    def timed(log: Log) -> None:
        for backend in ("cuda", "triton", "other"):
            log.write("time", **time_of(backend))

    checks = [Item("a", wrong, "cuda", True), Item("b", fine, "cuda", True), Item("c", fine, "triton", True)]
    todo = [Step("checks", 1, items(*checks)), Step("times", 1, items(Item("t", timed)))]
    log = Log(tmp_path, echo=False)
    steps.run(todo, HERE, log)
    assert done(log) == [("a", "FAILED: ValueError: 1 | 2"), ("b", "ok"), ("c", "ok"), ("t", "ok")]
    assert report.unproven(log.records) == {"cuda": "1 of 2 checks failed, a first", "other": "no check was made"}
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# gpu-verify: 4 steps done, 1 failed\n\nThe run is complete.\n")
    assert "| 2 x 3 | bfloat16 | cuda, way (unproven) | 0.500 | 1234 | 80% of torch.add |  | 2 |" in text
    assert "| 2 x 3 | bfloat16 | triton, way | 0.500 |" in text
    assert "| checks: a | FAILED: ValueError: 1 / 2 |" in text
    assert report.read(tmp_path / "lines.jsonl") == log.records
    found = report.measured(log.records)
    assert found is not None
    assert [t["backend"] for t in found["times"]] == ["triton"]
    assert report.measured([r for r in log.records if r.get("backend") != "triton"]) is None


class Ticks:
    """A clock that a step moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Any:
        def run(log: Log) -> None:
            self.now += seconds

        return run


def test_what_does_not_fit_is_dropped_by_priority_and_named(tmp_path: Path) -> None:
    clock = Ticks()
    slow = [Item(str(i), clock.takes(25)) for i in range(4)]
    todo = [
        Step("first", 60, items(*slow)),
        Step("second", 60, items(Item("x", fine))),
        Step("third", 90, items(Item("y", fine))),
    ]
    log = Log(tmp_path, echo=False)
    steps.run(todo, HERE, log, minutes=2, clock=clock)
    assert done(log) == [("0", "ok"), ("1", "ok"), ("2", "ok"), ("x", "ok")]
    dropped = [(r["step"], r["what"], r["why"]) for r in log.of("dropped")]
    assert dropped == [("third", "all", "2 minutes are too few"), ("first", "3", "the time of this step is over")]
    assert "- dropped: third: all (2 minutes are too few)" in (tmp_path / "report.md").read_text()
    log = Log(tmp_path, echo=False)
    steps.run(todo, HERE, log, clock=clock)
    assert len(done(log)) == 6


def test_a_step_that_cannot_list_its_items_fails_and_the_run_goes_on(tmp_path: Path) -> None:
    def broken(where: place.Place) -> Any:
        yield Item("a", fine)
        raise ValueError("no such layout")

    log = Log(tmp_path, echo=False)
    steps.run([Step("s", 1, broken), Step("t", 1, items(Item("b", fine)))], HERE, log)
    failed = ("the rest cannot be listed", "FAILED: RuntimeError: ValueError: no such layout")
    assert done(log) == [("a", "ok"), failed, ("b", "ok")]


def test_eight_minutes_hold_the_whole_plan_but_the_last_step() -> None:
    todo = plan.steps(HERE, Path())
    names = ["floor", "cuda", "triton", "times", "sweep", "peers", "ncu", "sanitizers"]
    assert list(steps.budgets(todo, 8)) == names
    assert steps.budgets(todo, 8)["sanitizers"] == 480
    assert list(steps.budgets(todo, 4)) == names[:4]
    assert list(steps.budgets(todo, 0.01)) == names[:1]
    assert list(steps.budgets(todo, None)) == [*names, "more"]


def test_another_process_goes_on_after_the_item_that_was_cut_off(tmp_path: Path) -> None:
    log = Log(tmp_path, echo=False)
    a, b, c = Item("a", fine, "cuda", True), Item("b", wrong, "cuda", True), Item("c", fine, "cuda", True)
    with pytest.raises(steps.LostError, match="s: b"):
        steps.run([Step("s", 1, items(a, b, c))], HERE, log, lost=lambda: True)
    log.write("begin", step="s", what="c", backend="cuda", proves=True, patience=1)
    log.close()
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('{"kind": "tim')  # cut off
    log = Log(tmp_path, resume=True, echo=False)
    steps.run([Step("s", 1, items(a, b, c, Item("d", fine)))], HERE, log)
    hung = "FAILED: the process ended or hung here"
    assert done(log) == [("a", "ok"), ("b", "FAILED: ValueError: 1 | 2"), ("c", hung), ("d", "ok")]
    assert report.read(tmp_path / "lines.jsonl") == log.records


SCRIPT = """
import os, signal, sys
from pathlib import Path
from benchmarks.gpu import place, plan, supervise
from benchmarks.gpu.report import Log
from benchmarks.gpu.steps import Item, Step, run
out = Path(sys.argv[1])
if "--worker" not in sys.argv:
    sys.exit(supervise.supervise([sys.executable, __file__, str(out), "--worker"], out / "lines.jsonl"))
supervise.die_with_parent()
here = place.stand_in()
(out / "pid").write_text(str(os.getpid()))
stuck = Step("stuck", 1, lambda place: iter([Item("for ever", lambda log: signal.pause(), patience=1e6)]))
floor = Step("floor", 1, plan.floor)
run([floor, stuck], here, Log(out, resume="--resume" in sys.argv))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_run_that_is_killed_leaves_a_report(tmp_path: Path) -> None:
    """The supervisor gets SIGKILL while an item runs: both files are whole, and nothing runs on."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stdout=subprocess.PIPE)
    lines, seen = tmp_path / "lines.jsonl", [Record()]
    while seen[-1].get("what") != "for ever":
        assert process.poll() is None
        time.sleep(0.05)
        seen = (report.read(lines) if lines.exists() else []) or [Record()]
    process.send_signal(signal.SIGKILL)
    out, _ = process.communicate()
    assert b"floor: torch.add over 8 GB" in out  # printed before it was cut off
    worker = int((tmp_path / "pid").read_text())
    while alive(worker):  # the kernel ends it
        time.sleep(0.05)
    for line in lines.read_text().splitlines():
        json.loads(line)
    text = (tmp_path / "report.md").read_text()
    assert "**The run is not complete.** Last begun: stuck: for ever." in text
    assert "| floor | torch.add over 8 GB | ok |" in text
    assert "- device: none: the CPU stands in for a GPU" in text


class Process:
    """A worker that has ended with a status, or hangs until it is killed."""

    def __init__(self, status: int | None) -> None:
        self.status = status

    def wait(self, timeout: float | None = None) -> int:
        if self.status is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0)
        return self.status

    def kill(self) -> None:
        self.status = -9


class Hangs(supervise.Watch):
    def hangs(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("statuses", "status"),
    [([0], 0), ([supervise.AGAIN, 1], 1), ([None, supervise.AGAIN, 0], 0), ([-6, 0], 0), ([-6], -6), ([2], 2)],
)
def test_workers_are_replaced_when_they_are_lost_or_hang(
    tmp_path: Path, statuses: list[int | None], status: int
) -> None:
    lines, started, left = tmp_path / "lines.jsonl", [], iter(statuses)
    lines.write_text('{"kind": "begin"}\n')  # of an earlier run
    os.utime(lines, (1, 1))

    def start(command: Sequence[str]) -> Process:
        started.append(command)
        if statuses != [-6]:
            lines.write_text('{"kind": "begin", "patience": 7}\n')
        return Process(next(left))

    assert supervise.supervise(["work"], lines, start=start, watch=Hangs(lines)) == status
    assert started == [["work"], *(["work", "--resume"],) * (len(statuses) - 1)]


def test_a_worker_hangs_when_it_writes_nothing_for_longer_than_it_said(tmp_path: Path) -> None:
    lines, clock = tmp_path / "lines.jsonl", Ticks()
    watch = supervise.Watch(lines, clock)
    clock.now += supervise.STARTING
    assert not watch.hangs()
    with lines.open("a") as file:
        file.write('{"kind": "begin", "patience": 7}\n{"kind": "ti')
    clock.now += 1000
    assert not watch.hangs()  # it has written
    clock.now += 7
    assert not watch.hangs()
    clock.now += 0.1
    assert watch.hangs()
    watch.restart()
    assert not watch.hangs()


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_verify, "die_with_parent", lambda: None)
    assert gpu_verify.main(["--worker", "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == "gpu-verify: torch sees no CUDA or ROCm GPU here; nothing was verified\n"
    assert not (tmp_path / "none").exists()
    for minutes in ("0", "-1", "nan"):
        with pytest.raises(SystemExit):
            gpu_verify.main(["--minutes", minutes])
        assert f"--minutes {minutes}: expected a positive number" in capsys.readouterr().err


def test_the_stand_in_does_the_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_verify, "die_with_parent", lambda: None)
    assert gpu_verify.main(["--worker", "--stand-in", "--out", str(tmp_path), "--only", "floor"]) == 0
    records = report.read(tmp_path / "lines.jsonl")
    assert [r["what"] for r in records if r["kind"] == "done"] == [
        "cudfast info", *(f"torch.add over {size} GB" for size in (1, 2, 4, 8))
    ]  # fmt: skip
    assert records[-1] == {"kind": "end"}
