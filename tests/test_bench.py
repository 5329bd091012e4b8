"""The measuring module: the timed code, the gate, the contents of a result. Times themselves are not tested."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")

from rich.console import Console

from cudfast.__main__ import main
from cudfast.bench import command, contestants
from cudfast.bench.cases import make, with_gradient
from cudfast.bench.compare import compare, read
from cudfast.bench.contestants import CE, CUD, DUS, Contestant
from cudfast.bench.gate import gate, truth
from cudfast.bench.memory import CLEAR, peak
from cudfast.bench.race import Race
from cudfast.bench.result import Figures, Result
from cudfast.bench.shapes import SHAPES, Shape

SMALL = Shape(4, 33, "a test")


def result(times: dict[str, list[float]], *, title: str = "CUDLoss") -> Result:
    """A race that took those times; the last is the floor."""
    race = Race([Contestant(name, lambda: None) for name in times])
    race.seconds = times
    return Result.of(title, race, SMALL, torch.float32, list(times)[-1], peaks={}, absent={})


def exact(seconds: dict[str, float]) -> Race:
    """A race of contestants that take so long by their own clocks, however busy the machine is."""

    def contestant(name: str, takes: float) -> Contestant:
        now = 0.0

        def call() -> None:
            nonlocal now
            now += takes

        return Contestant(name, call, clock=lambda: now)

    return Race([contestant(*each) for each in seconds.items()])


def test_shapes_say_who_uses_them() -> None:
    assert all(shape.used_by for shape in SHAPES.values())
    classes = [shape.classes for shape in SHAPES.values()]
    assert classes == sorted(set(classes))
    assert {77, 1000, 32_000, 128_256, 151_936, 262_144, 2_812_281, 10**7, 10**8} == set(classes)


def test_a_round_times_everybody_and_prepares_first() -> None:
    log: list[str] = []

    def one(name: str) -> Contestant:
        return Contestant(name, lambda: log.append(name), lambda: log.append(f"prepare {name}"))

    race = Race([one("ours"), one("peer")], warm=2)
    log.clear()
    for _ in range(6):
        race.round()
    assert {name: len(times) for name, times in race.seconds.items()} == {"ours": 6, "peer": 6}
    assert log.count("ours") == 6 * 3  # two warm calls, one timed
    assert log.count("prepare ours") == 6
    assert log[-4:] == ["prepare ours", "ours", "ours", "ours"]


def test_bytes_rates_and_fractions() -> None:
    found = result({"ours": [2.0, 1.0, 3.0], "floor": [1.0, 1.0, 1.0]})
    ours = found.contestants["ours"]
    work = 3 * 4 * 33 * 4  # two reads and one write of float32
    assert (ours.median_ms, ours.rounds, ours.work) == (2000.0, 3, work)
    assert ours.rate == pytest.approx(work / 2 / 1e9)
    assert (ours.of_floor, ours.over_floor, ours.over_ours) == (0.5, 2.0, 1.0)
    assert found.threads == torch.get_num_threads()
    assert Result.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.goal("ours", "floor", 2.5, None, at_most=True).met
    assert not found.goal("ours", "floor", 3, None, at_most=False).met
    assert [goal[-1] for goal in found.table().goals] == ["yes", "NO"]


@pytest.mark.parametrize("entry", [CUD, CE, DUS], ids=lambda entry: entry.title)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gate_lets_ours_pass(entry: contestants.Entry, dtype: torch.dtype) -> None:
    data = make(SMALL, dtype)
    entry.check(entry.ours(data), data)


@pytest.mark.parametrize(
    "spoil",
    [lambda v, g: (v + 1e-3, g), lambda v, g: (v, g * 1.001), lambda v, g: (v, g.clone().fill_diagonal_(torch.nan))],
    ids=["loss", "gradient", "NaN"],
)
def test_the_gate_stops_wrong_numbers(spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    data = make(SMALL)
    value, gradient = with_gradient(CUD.forms(data)["fresh gradient"])()
    true = truth(CUD.plain, data.plain, data.teacher, data.labels)
    gate("ours", (value, gradient), true)
    with pytest.raises(AssertionError, match="spoiled"):
        gate("spoiled", spoil(value, gradient), true)


def test_wrong_numbers_have_no_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(command.LOSSES, "cud", replace(CUD, plain=lambda s, t, y: CUD.plain(s, t, y) * 1.01))
    console = Console(record=True, width=160)
    out = tmp_path / "new.json"
    parsed = options("--quick", "--shape", "4x33", "--json", str(out))
    assert command.main(parsed, console) == 1
    text = console.export_text()
    assert "CUDLoss 4 x 33 float32: no times, its numbers are wrong" in text
    assert "median ms" not in text
    assert json.loads(out.read_text())["races"] == []


def options(*arguments: str) -> command.argparse.Namespace:
    parser = command.argparse.ArgumentParser()
    command.arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_writes_what_it_compares(tmp_path: Path) -> None:
    old, console = tmp_path / "old.json", Console(record=True, width=160)
    asked = ("--quick", "--loss", "cud", "dus", "--shape", "4x33", "--dtype", "bfloat16", "--json", str(old))
    assert command.main(options(*asked), console) == 0
    races = read(old)
    assert [race.title for race in races] == ["CUDLoss", "DUSLoss"]
    assert [next(iter(race.contestants)) for race in races] == ["given gradient"] * 2
    assert all(race.dtype == "bfloat16" and race.isa for race in races)
    if CLEAR.exists():
        assert all(f.peak_bytes is not None for race in races for f in race.contestants.values())
    text = console.export_text()
    assert "eager PyTorch" in text
    assert "of torch.add" in text
    same = compare(races, races)
    assert {c.ratio for c in same} == {1.0}
    assert {c.verdict for c in same} == {""}


def test_the_command_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--shape", "512*100"])
    assert "'512*100': expected NxV" in capsys.readouterr().err
    assert main(["bench", "--compare", str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text("[]")
    assert main(["bench", "--compare", str(tmp_path / "other.json")]) == 2
    assert "expected a JSON of `python -m cudfast bench --json`" in capsys.readouterr().err


def noisy(scale: float, count: int = 30) -> list[float]:
    """Times around `scale`, spread by a tenth."""
    return [scale * (1 + 0.1 * ((i * 7 % count) / count - 0.5)) for i in range(count)]


@pytest.mark.parametrize(
    ("factor", "machine", "verdict"),
    [
        (1.0, 1.0, ""),
        (1.0, 3.0, ""),  # a slower machine slows the floor alike
        (1.02, 1.0, ""),  # within noise
        (1.3, 1.0, "slower"),
        (1.3, 3.0, "slower"),
        (0.7, 1.0, "faster"),
    ],
)
def test_compare(factor: float, machine: float, verdict: str) -> None:
    old = result({"ours": noisy(1.0), "floor": noisy(0.5)})
    new = result({"ours": noisy(factor * machine), "floor": noisy(0.5 * machine)})
    (change,) = compare([old], [new])
    assert change.contestant == "ours"
    assert change.ratio == pytest.approx(factor)
    assert change.low <= factor <= change.high
    assert change.verdict == verdict


def test_a_slowed_contestant_is_flagged() -> None:
    def raced(milliseconds: float) -> Result:
        race = exact({"ours": milliseconds / 1e3, "peer": 2e-3, "floor": 1e-3})
        for _ in range(12):
            race.round()
        return Result.of("CUDLoss", race, SMALL, torch.float32, "floor", peaks={}, absent={})

    old = raced(2)
    slowed = {c.contestant: c.verdict for c in compare([old], [raced(4)])}
    assert slowed == {"ours": "slower", "peer": ""}


def test_too_few_noisy_rounds_prove_nothing() -> None:
    old = result({"ours": [1.0, 2.0, 1.5], "floor": [1.0, 1.0, 1.0]})
    new = result({"ours": [1.1, 2.2, 1.7], "floor": [1.0, 1.0, 1.0]})
    assert compare([old], [new])[0].verdict == ""


def test_compare_leaves_out_what_only_one_run_has() -> None:
    old, new = result({"ours": [1.0], "floor": [1.0]}), result({"ours": [1.0], "floor": [1.0]}, title="DUSLoss")
    assert compare([old], [new]) == []


def test_reads_what_pytest_benchmark_wrote(tmp_path: Path) -> None:
    race = result({"ours": [1.0], "floor": [1.0]})
    content = {"benchmarks": [{"extra_info": {"race": race.to_json()}}, {"extra_info": {"memory": {}}}]}
    (tmp_path / "bench.json").write_text(json.dumps(content))
    assert read(tmp_path / "bench.json") == [race]


@pytest.mark.skipif(not CLEAR.exists(), reason="needs /proc/self/clear_refs (Linux)")
def test_peak_memory_is_measured() -> None:
    size, kept = 64 << 20, []

    def call() -> None:
        torch.ones(size, dtype=torch.uint8)  # gone when the call ends
        kept.append(torch.ones(size // 2, dtype=torch.uint8))

    for _ in range(2):  # what the first call freed does not hide what the second one takes
        kept.clear()
        found = peak(call)
        assert found is not None
        assert abs(found - size) < 4 << 20


def test_figures_of_a_race_that_measured_no_memory() -> None:
    found = result({"ours": [1.0], "floor": [1.0]})
    assert isinstance(found.contestants["ours"], Figures)
    assert found.table().rows[0][-1] == ""


@pytest.mark.parametrize(
    ("budget", "ours", "peer", "slow"),
    [
        (60.0, 30, 30, 30),
        (0.3, 30, 30, 10),  # 100 ms each: ten calls of 10 ms
        (0.03, 10, 10, 3),  # 10 ms each: ten rounds of ours
        (0.0, 3, 3, 3),
    ],
)
def test_a_budget_thins_out_who_is_slow_but_everybody_has_three_rounds(
    budget: float, ours: int, peer: int, slow: int
) -> None:
    race = exact({"ours": 0.00099, "peer": 0.0005, "slow": 0.00999})
    rounds = race.fit(30, budget)
    for _ in range(rounds):
        race.round()
    assert {name: len(times) for name, times in race.seconds.items()} == {"ours": ours, "peer": peer, "slow": slow}
