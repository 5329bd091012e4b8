"""The code around the benchmarks: peers compute the loss that is claimed, and the report shows the measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks import bench_cud, bench_dus, bench_scaling, bench_small, instructions, peers, report
from cudfast.bench.cases import make
from cudfast.bench.contestants import Contestant
from cudfast.bench.gate import Loss
from cudfast.bench.race import Race
from cudfast.bench.result import Result
from cudfast.bench.shapes import SHAPES, Shape

WRONG = [
    (bench_cud, "CUD", lambda race: bench_cud.bench_float32(race, "Llama 2")),
    (bench_cud, "CUD", lambda race: bench_cud.bench_sixteen_bits(race, "Llama 2", torch.bfloat16)),
    (bench_cud, "CE", bench_cud.bench_cross_entropy),
    (bench_dus, "DUS", lambda race: bench_dus.bench_dus(race, "Llama 2", torch.float32)),
    (bench_small, "CUD", lambda race: bench_small.bench_small(race, bench_small.CUD)),
    (bench_scaling, "CUD", bench_scaling.bench_threads),
]


@pytest.mark.parametrize(("module", "entry", "bench"), WRONG)
def test_wrong_numbers_are_not_raced(
    module: Any, entry: str, bench: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A formula that is off by a percent is as far from the kernel as a kernel that is off from the formula."""
    right = getattr(module, entry)
    monkeypatch.setattr(module, entry, replace(right, plain=lambda *given: right.plain(*given) * 1.01))
    monkeypatch.setattr(module, "SHAPES", dict.fromkeys(module.SHAPES, Shape(4, 33)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    raced: list[object] = []
    with pytest.raises(AssertionError, match=r"error .*, allowed "):
        bench(lambda *given, **named: raced.append(given))
    assert not raced


def test_mft_style_makes_the_label_lead() -> None:
    """Where the label leads by the margin already, the target is the teacher's own distribution."""
    student, labels = torch.randn(2, 5, dtype=torch.float64), torch.tensor([1, 1])
    teacher = torch.tensor([[0.0, 3.0, 0, 0, 0], [3.0, 0, 0, 0, 0]], dtype=torch.float64)
    log_s, p = student.log_softmax(-1), teacher.softmax(-1)
    target = p.clone()
    share = (p[1, 0] - p[1, 1] + 0.2) / (1 + p[1, 0] - p[1, 1])
    target[1] *= 1 - share
    target[1, 1] += share
    assert target[1, 1] - target[1, 0] == pytest.approx(0.2)
    wanted = functional.kl_div(log_s, target, reduction="batchmean")
    torch.testing.assert_close(peers.mft_style()(student, teacher, labels), wanted)


def test_torchdistill_computes_kl_and_cross_entropy() -> None:
    pytest.importorskip("torchdistill")
    data = make(Shape(4, 9))
    s, t = data.plain / 2, data.teacher / 2
    kl = functional.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    wanted = 0.8 * 4 * kl + 0.2 * functional.cross_entropy(data.plain, data.labels)
    torch.testing.assert_close(peers.torchdistill()(data.plain, data.teacher, data.labels), wanted)


def test_peers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Loss:
        raise ImportError("no such library")

    monkeypatch.setattr(peers, "DISTILLATION", {"MFT-style": peers.mft_style, "other": missing})
    found, absent = peers.distillation(make(Shape(4, 9)))
    assert [c.name for c in found] == ["MFT-style"]
    assert absent["other"] == "not installed (no such library)"
    assert "GPU" in absent["liger-kernel"]
    found, absent = peers.distillation(make(Shape(4, 9)), skip="too large")
    assert found == []
    assert absent["MFT-style"] == "left out: too large"


def raced(title: str, shape: Shape, times: dict[str, float], floor: str, dtype: torch.dtype = torch.float32) -> Result:
    race = Race([Contestant(name, lambda: None) for name in times])
    race.seconds = {name: [seconds, seconds * 1.01, seconds * 0.99] for name, seconds in times.items()}
    return Result.of(
        title, race, shape, dtype, floor, peaks=dict.fromkeys(times, 1 << 20), absent={"peer": "needs a GPU"}
    )


def results() -> list[Result]:
    """One race of every kind."""
    times = {"given gradient": 0.01, "fresh gradient": 0.02, "eager PyTorch": 0.3, "torch.add": 0.008}
    large = [raced("CUDLoss", SHAPES[name], times, "torch.add") for name in ("Banking77", "Llama 2", "Llama 3")]
    large[1].goal("eager PyTorch", "given gradient", 30, 50, at_most=False)
    large[1].goal("given gradient", "torch.add", 1.2, None, at_most=True)
    lengths = {"V = 1,000": 0.1, "V = 10,000": 0.09, "torch.add": 0.07}
    threads = {"given gradient, 2 threads": 0.01, "given gradient, 1 threads": 0.02}
    return [
        *large,
        raced("CUDLoss", SHAPES["Llama 2"], times, "torch.add", torch.bfloat16),
        raced("CUDLoss, given gradient, N V = 1e4", Shape(1, 10_000), lengths, "torch.add"),
        raced("CUDLoss, threads", SHAPES["Llama 2"], threads, "given gradient, 1 threads"),
    ]


ESTIMATE = {
    "kernel": "student, fused", "gpu": "H100", "dtype": "bf16", "classes": 32_000, "registers": 64, "programs": 8,
    "bytes_per_element": 6.0, "instructions_per_element": 50.8, "exponentials_per_element": 4.0, "picoseconds": 1.79,
    "bound": "memory", "half_rate_per_element": 18.9, "in_flight": 0.9, "share": 0.55,
}  # fmt: skip
MEASURED = {
    "shape": "512 x 32,000", "dtype": "bfloat16", "name": "cuda, given gradient", "milliseconds": 0.05,
    "gigabytes_per_second": 1966.0, "floor": "torch.add", "of_floor": 0.7, "peak_bytes": 0, "kind": "time",
    "backend": "cuda", "called_ms": None,
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(races: list[Result], **info: object) -> Path:
        found = [{"extra_info": {"race": race.to_json()}} for race in races]
        content = {
            "machine_info": {"cudfast": {"processor": "a test's", "instruction set": "avx2"}},
            "datetime": "2026-01-02T03:04:05+00:00",
            "benchmarks": [*found, {"extra_info": info}],
        }
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_the_report(written: Callable[..., Path], tmp_path: Path) -> None:
    memory = {"unit": 4e6, "cases": {"in place": {"peak": 0.0, "between": 0.0}, "eager PyTorch": {"peak": 6.03}}}
    path = written(results(), memory=memory, estimates=[ESTIMATE])
    run = tmp_path / "lines.jsonl"
    facts = {"kind": "facts", "device": "Some GPU, 80 GiB"}
    check = {"kind": "done", "step": "cuda", "what": "it", "backend": "cuda", "proves": True, "verdict": "ok"}
    run.write_text("\n".join(map(json.dumps, (facts, MEASURED, check))))
    out = tmp_path / "docs"
    out.mkdir()
    assert report.main([str(path), "--out", str(out), "--gpu", str(run), "--quick"]) == 0
    text = (out / "benchmarks.md").read_text()
    assert "Measured 2026-01-02 on: processor a test's, instruction set avx2." in text
    assert "A short run" in text
    assert "**512 x 32,000 float32**: tokens of a vocabulary" in text
    assert "| eager PyTorch | 300 |" in text
    assert "| peer | needs a GPU |" in text
    assert "| eager PyTorch | 6.03 | – |" in text
    assert "| CUDLoss, 512 x 32,000 float32 | eager PyTorch / given gradient | 30.00 | ≥ 30 | 50 | yes |" in text
    assert "| given gradient / torch.add | 1.25 | ≤ 1.2 | – | **no** |" in text
    assert "## GPUs: a model, not a measurement" in text
    assert "**Measured on Some GPU, 80 GiB** (`make gpu-verify`)" in text
    pictures = {p.name for p in (out / "benchmarks").iterdir()}
    assert pictures == {
        "classes.svg", "speedup-77.svg", "speedup-32000.svg", "memory.svg", "scaling.svg", "threads.svg", "gpu.svg"
    }  # fmt: skip
    assert all(f"benchmarks/{name}" in text for name in pictures)
    svg = (out / "benchmarks" / "gpu.svg").read_text()
    assert "H100, V = 32,000 (model)" in svg
    assert "Some GPU, 512 x 32,000, cuda (measured)" in svg
    assert "| 512 x 32,000 | bfloat16 | cuda, given gradient | 0.050 | 1966 | 70% of torch.add |" in text
    run.write_text("\n".join(map(json.dumps, (facts, MEASURED, check | {"verdict": "FAILED: wrong"}))))
    assert report.main([str(path), "--out", str(out), "--gpu", str(run), "--quick"]) == 0
    assert "nothing here has been timed on a GPU" in (out / "benchmarks.md").read_text()


def test_the_report_of_a_part_leaves_the_rest_out(written: Callable[..., Path], tmp_path: Path) -> None:
    found = report.Found([written(results()[1:2])])
    text = report.document(found, tmp_path / "pictures")
    assert "## CUDLoss against V" in text
    assert "## Memory" not in text
    assert "GPUs" not in text
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["speedup-32000.svg"]


def test_later_files_replace_races_and_regressions_are_told(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"given gradient": 0.01, "fresh gradient": 0.02, "torch.add": 0.008}
    old = written([raced("CUDLoss", SHAPES["Llama 2"], times, "torch.add")])
    new = written([raced("CUDLoss", SHAPES["Llama 2"], {**times, "given gradient": 0.013}, "torch.add")])
    assert report.Found([old, new]).of("CUDLoss")[0].contestants["given gradient"].median_ms == pytest.approx(13)
    assert report.main([str(new), "--out", str(tmp_path), "--compare", str(old)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradient" in line]
    assert [line.rstrip().endswith("slower") for line in lines] == [True, False]


def test_instructions_beyond_tolerance_are_told() -> None:
    kept = {"avx2: a": 10.0, "avx2: b": 10.0, "avx2: gone": 1.0}
    found = [instructions.Count("avx2", "a", 10.29), instructions.Count("avx2", "b", 9.6)]
    assert instructions.differences(kept, found) == [
        "avx2: gone: in one of both lists only",
        "avx2: b: 10.000 -> 9.600 instructions a logit (-4.0%)",
    ]
    assert instructions.differences({"avx2: a": 10.0}, [instructions.Count("avx2", "a", 10.31)])


def test_instructions_without_valgrind_or_with_another_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main([]) == 0
    assert "NOT CHECKED, valgrind is not installed" in capsys.readouterr().err
    assert instructions.main(["--write"]) == 2
    monkeypatch.setattr(instructions.shutil, "which", lambda name: "/usr/bin/valgrind")
    monkeypatch.setattr(instructions, "build", lambda: Path("count_core"))
    monkeypatch.setattr(instructions, "compiler", lambda: "another 1.0")
    capsys.readouterr()
    assert instructions.main([]) == 0
    assert "NOT COMPARABLE" in capsys.readouterr().err


def test_kept_instructions_are_of_both_sets() -> None:
    kept = json.loads(instructions.KEPT.read_text())
    assert kept["compiler"]
    assert {key.split(":")[0] for key in kept["per_logit"]} == {"baseline", "avx2"}
