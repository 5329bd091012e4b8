"""The demo examples/cldr_names: its split, metrics, files, report, conclusion and command line."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for name in ("babel", "jinja2", "matplotlib", "rich"):
    pytest.importorskip(name)
ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "examples" / "cldr_names").is_dir():
    pytest.skip("the examples are not part of this copy", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from examples.cldr_names import __main__ as cli  # noqa: E402
from examples.cldr_names import data as cldr  # noqa: E402
from examples.cldr_names.conclusion import PAIRS, compare, conclude  # noqa: E402
from examples.cldr_names.experiment import Config, Experiment, Results, work  # noqa: E402
from examples.cldr_names.methods import METHODS  # noqa: E402
from examples.cldr_names.report import save_csv, save_html, show  # noqa: E402
from examples.cldr_names.timing import preflight, require_same  # noqa: E402
from examples.common import data, methods, metrics  # noqa: E402
from examples.common.files import whole_file  # noqa: E402
from examples.common.metrics import Scores, outcome, score  # noqa: E402
from examples.common.model import STUDENT  # noqa: E402
from examples.common.ngrams import encode  # noqa: E402
from examples.common.progress import Meter  # noqa: E402
from examples.common.train import Schedule, fit, logits_of  # noqa: E402

TINY = Config(seeds=2, trials=4, teacher_epochs=1, student_epochs=1, batch=32, timing_steps=3)
SHARES = (0.6, 0.15, 0.25)


@pytest.fixture(scope="module")
def names() -> dict[str, set[str]]:
    """Three languages of 100 strings; "b" shares 40 with "a"; "c" stands alone."""
    shared = {f"both {i}" for i in range(40)}
    return {
        "a": shared | {f"alpha {i}" for i in range(60)},
        "b": shared | {f"beta {i}" for i in range(60)},
        "c": {f"gamma {i}" for i in range(100)},
        "few": {"one", "two"},
    }


@pytest.fixture(scope="module")
def small(names: dict[str, set[str]]) -> data.Dataset:
    shift = {"a": {"alpha 1", "alpha coin"}, "b": {"beta coin"}, "few": {"ignored"}}
    return data.build(names, shift, min_strings=50)


@pytest.fixture(scope="module")
def console() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def results(small: data.Dataset, console: Console) -> Results:
    with Meter(console, work(small, TINY)) as meter:
        return Experiment(small, TINY, meter).run()


def test_split_is_by_string_and_each_language_has_its_share(names: dict[str, set[str]]) -> None:
    parts = [set(part) for part in data.split_strings(names, SHARES, seed=0)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(set().union(*names.values()))
    for code in ("a", "b", "c"):
        for part, share in zip(parts, SHARES, strict=True):
            assert abs(len(part & names[code]) - 100 * share) <= 12, (code, share)


def test_split_depends_on_the_seed_alone(names: dict[str, set[str]]) -> None:
    reordered = dict(reversed(names.items()))
    assert data.split_strings(names, SHARES, 1) == data.split_strings(reordered, SHARES, 1)
    assert data.split_strings(names, SHARES, 1) != data.split_strings(names, SHARES, 2)


def test_split_rejects_shares_that_do_not_add_up(names: dict[str, set[str]]) -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        data.split_strings(names, (0.5, 0.5, 0.5), 0)


def test_rows_are_the_pairs_and_shift_has_only_new_strings(small: data.Dataset) -> None:
    assert small.classes == ["a", "b", "c"]
    rows = [small.train, small.validation, small.tests["in distribution"]]
    assert sum(map(len, rows)) == 300
    assert sum(len(part.bags) for part in rows) == 260
    assert small.tests["under shift"].label.tolist() == [0, 1]
    accuracy, nll = data.make_split(["x", "y"], {"a": {"x", "y"}, "b": {"x"}}, ["a", "b"]).ceiling()
    assert (accuracy, nll) == pytest.approx((2 / 3, 2 * np.log(2) / 3))


def test_cldr_parts_share_no_string(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[set[str]] = []

    def recording(strings: list[str], *rest: Any) -> data.Split:
        parts.append(set(strings))
        return original(strings, *rest)

    original = data.make_split
    monkeypatch.setattr(data, "make_split", recording)
    loaded = cldr.load(max_strings=50)
    assert len(loaded.classes) > 200
    assert len(parts) == 4
    assert sum(map(len, parts)) == len(set().union(*parts))
    for part in (loaded.train, loaded.validation, loaded.tests["in distribution"]):
        assert len(part.label.unique()) > 0.95 * len(loaded.classes)


def test_bags_hold_the_ngrams_of_each_string() -> None:
    bags = encode(["ab", "b", "ab"])
    # With both ends marked "ab" has 4 + 3 + 2 + 1 n-grams and "b" has 3 + 2 + 1.
    assert bags.start.tolist() == [0, 10, 16, 26]
    assert torch.equal(bags.grams[:10], bags.grams[16:])
    grams, offsets = bags.take(torch.tensor([1, 0]))
    assert offsets.tolist() == [0, 6]
    assert torch.equal(grams, torch.cat([bags.grams[10:16], bags.grams[:10]]))


def test_metrics_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])
    rows = outcome(probs.log(), torch.tensor([0, 1, 1, 1]))
    found = score(rows)
    assert found.accuracy == pytest.approx(3 / 4)
    assert found.nll == pytest.approx(-np.log([0.9, 0.3, 0.6, 0.8]).mean(), rel=1e-5)
    # Every row has a bin of its own, of either kind: errors of 0.1, 0.7, 0.4 and 0.2.
    assert found.ece == pytest.approx((0.1 + 0.7 + 0.4 + 0.2) / 4, rel=1e-5)
    assert found.adaptive_ece == pytest.approx(found.ece)
    assert found.brier == pytest.approx(2 * (0.1**2 + 0.7**2 + 0.4**2 + 0.2**2) / 4, rel=1e-5)
    # From most to least confident: right, right, wrong, right.
    assert found.aurc == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    assert found.auroc == pytest.approx(2 / 3)
    total, confidence, correct = metrics.reliability(rows)
    assert (total.sum(), correct.sum()) == (4, 3)
    assert confidence.sum() == pytest.approx(0.9 + 0.7 + 0.6 + 0.8)


def test_metrics_of_certain_answers() -> None:
    rows = outcome(torch.tensor([[200.0, 0.0], [0.0, 200.0]]), torch.tensor([0, 1]))
    found = score(rows)
    assert replace(found, auroc=0) == Scores(accuracy=1, nll=0, ece=0, adaptive_ece=0, brier=0, aurc=0, auroc=0)
    assert np.isnan(found.auroc)  # undefined without wrong answers
    assert metrics.reliability(rows)[0, -1] == 2


def test_metrics_against_torchmetrics_and_repeated_rows() -> None:
    """A weight of 3 is a row that occurs 3 times, except that ranks do not move within it."""
    oracle = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(500, 7, generator=generator), torch.randint(7, (500,), generator=generator)
    logits[torch.arange(500), labels] += 1.5
    rows = outcome(logits, labels, chunk=128)
    found, probs = score(rows), logits.softmax(1)
    assert found.accuracy == pytest.approx(float(oracle.multiclass_accuracy(probs, labels, 7, average="micro")))
    assert found.ece == pytest.approx(float(oracle.multiclass_calibration_error(probs, labels, 7, n_bins=15)), rel=1e-4)
    right = torch.from_numpy(rows.correct).long()
    assert found.auroc == pytest.approx(float(oracle.binary_auroc(torch.from_numpy(rows.confidence), right)), rel=1e-6)
    weights = np.random.default_rng(0).integers(0, 4, 500)
    repeated = rows.take(np.repeat(np.arange(500), weights))
    for name in ("accuracy", "nll", "ece", "brier", "auroc"):
        weighted = metrics.MEASURES[name].of(rows, weights[None].astype(float))[0]
        assert weighted == pytest.approx(getattr(score(repeated), name), rel=1e-9), name


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_write_leaves_the_folder_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    def write(path: Path) -> None:
        with whole_file(path) as file:
            file.write("half")
            file.flush()
            raise error

    kept = tmp_path / "kept.csv"
    kept.write_text("before")
    for path in (kept, tmp_path / "new.csv"):
        with pytest.raises(error):
            write(path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.csv"]
    assert kept.read_text() == "before"


def test_training_repeats_for_a_seed(small: data.Dataset) -> None:
    def train(seed: int) -> torch.Tensor:
        loss = methods.batch_loss(methods.CE_STUDENT, {}, small.train, None)
        return logits_of(fit(STUDENT, 3, small.train, loss, Schedule(1, 0.01, 32), seed), small.train)

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


def test_methods_search_alike() -> None:
    drawn = {}
    for method in METHODS:
        first = methods.rate_settings(method)
        drawn[method.name] = first + methods.other_settings(method, first[1], 4, seed=0)
    assert {len(tried) for tried in drawn.values()} == {7}
    for kd, cud in zip(drawn["KD"], drawn["CUD"], strict=True):
        assert kd == {name: cud[name] for name in kd}
    assert drawn["CUD"][1] == {name: methods.KNOBS[name].default for name in methods.CUD.knobs}
    assert len({setting["student_rate"] for setting in drawn["Student CE"]}) == 7
    for name, value in (pair for setting in drawn["CUD"] for pair in setting.items()):
        assert methods.KNOBS[name].low <= value <= methods.KNOBS[name].high


def test_timing_refuses_losses_that_differ() -> None:
    logits, teacher = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5

    def loss(scale: float) -> methods.CUDLoss:
        return methods.distillation({"temperature": scale, "kd_weight": 0.5, "budget": 0.5, "margin": 0.7})

    preflight()
    require_same(loss(2.0), loss(2.0), logits, teacher, labels)
    with pytest.raises(RuntimeError, match="differs from plain PyTorch"):
        require_same(loss(2.0), loss(3.0), logits, teacher, labels)


def test_tiny_run_writes_a_full_report(tmp_path: Path, small: data.Dataset, results: Results, console: Console) -> None:
    show(console, results)
    table, runs = save_csv(tmp_path, results)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows[::2]] == [method.name for method in METHODS]
    assert all(0 <= float(row["accuracy_mean"]) <= 1 and float(row["nll_mean"]) > 0 for row in rows)
    assert len(runs.read_text(encoding="utf-8").splitlines()) == 1 + len(METHODS) * 2 * TINY.seeds
    page = save_html(tmp_path, results, small, TINY).read_text(encoding="utf-8")
    for method in METHODS:
        assert f"<td>{method.name}</td>" in page
    for found in compare(results.scores, *PAIRS[0], data.PARTS[0]):
        text = {"better": "▲\u202f", "worse": "▼\u202f"}.get(found.verdict, "") + str(found).replace("±", "<wbr>±")
        assert f'<td class="{found.verdict}">{text}</td>' in page
    assert page.count("data:image/svg+xml;base64,") == 3
    assert re.findall(r"""(?:src|href)\s*=\s*(?!["']?data:)[^\s>]+|@import|url\(""", page) == []
    for line in conclude(results.scores):
        assert line in page
    assert "Unicode License" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["per_seed.csv", "report.html", "results.csv"]


def test_one_seed_still_makes_a_report(tmp_path: Path, small: data.Dataset, results: Results, console: Console) -> None:
    scores = {name: {part: runs[:1] for part, runs in parts.items()} for name, parts in results.scores.items()}
    single = replace(results, scores=scores)
    show(console, single)
    page = save_html(tmp_path, single, small, replace(TINY, seeds=1)).read_text(encoding="utf-8")
    assert "cannot say whether CUD helps" in page


@pytest.mark.parametrize(
    ("changes", "headline", "sentence"),
    [
        ((0.02, 0.03, 0.02), "CUD helps over KD by some measures.", "+2.33±0.58 points, a gain that exceeds"),
        (
            (-0.02, -0.03, -0.02),
            "CUD does not help over KD on this task. ",
            "-2.33±0.58 points, a loss that exceeds",
        ),
        (
            (0.02, -0.02, 0.0),
            "CUD does not help over KD on this task: no measure",
            "does not exceed the spread",
        ),
        ((0.02,), "One seed has no spread", "nothing follows"),
    ],
)
def test_conclusion_follows_the_numbers(changes: tuple[float, ...], headline: str, sentence: str) -> None:
    same = Scores(accuracy=0.5, nll=2.0, ece=0.1, adaptive_ece=0.1, brier=0.7, aurc=0.3, auroc=0.8)
    scores = {method.name: {part: [same] * len(changes) for part in data.PARTS} for method in METHODS}
    scores["CUD"] = {part: [replace(same, accuracy=0.5 + change) for change in changes] for part in data.PARTS}
    first, *rest = conclude(scores)
    assert first.startswith(headline)
    assert len(rest) == 2
    assert all(sentence in line for line in rest)


def test_conclusion_tells_gains_from_losses() -> None:
    same = Scores(accuracy=0.5, nll=2.0, ece=0.1, adaptive_ece=0.1, brier=0.7, aurc=0.3, auroc=0.8)
    scores = {method.name: {part: [same] * 2 for part in data.PARTS} for method in METHODS}
    scores["CUD"] = {part: [replace(same, accuracy=0.4, nll=1.5)] * 2 for part in data.PARTS}
    assert conclude(scores)[0] == (
        "CUD helps over KD by some measures and hurts by others. "
        "In distribution: better NLL; worse Accuracy; same ECE, Brier, AURC. "
        "Under shift: better NLL; worse Accuracy; same ECE, Brier, AURC."
    )


def test_command_line_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        cli.main(["--seeds", "0"])
    assert "at least 1, not '0'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(["--out", str(tmp_path / "file")]) == 1
    assert "choose another folder" in capsys.readouterr().err
    monkeypatch.setattr(cli, "run", interrupt)
    assert cli.main([]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(cli, "_NEEDED", ("rich", "no_such_package"))
    assert cli.main([]) == 1
    assert capsys.readouterr().err == "Missing packages: pip install no_such_package\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_in_a_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "examples.cldr_names",
        "--quick",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a background job is born deaf to it
    ) as process:
        assert process.stdout is not None
        try:
            while "Search" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
        finally:
            process.kill()  # if it hangs: leaving the block waits for it
    assert process.returncode == 130
    assert errors == "Interrupted: no file was left half-written.\n"
    assert list(tmp_path.iterdir()) == []
