"""make versions: what it tries is what pyproject.toml and docs/versions.md promise, and a failure does not end it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from . import versions
from .versions import PROMISED, SUITE, Row, nearest, table, tally

ROOT = Path(__file__).parents[1]
REPORT = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10" time="1.0">
<testcase classname="tests" name="test_a"/></testsuite></testsuites>"""


def test_the_oldest_torch_is_that_of_the_package() -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert floor
    oldest = min(PROMISED, key=lambda name: [int(part) for part in re.findall(r"\d+", name)] or [99])
    assert PROMISED[oldest].torch.startswith(f"torch=={floor[1]}.")
    documented = re.findall(r"^\| (\d+\.\d+)", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    assert {*PROMISED, *documented} - {"newest"} <= set(documented)


def test_every_file_is_there() -> None:
    files = {name.partition("::")[0] for name in SUITE}
    assert [name for name in files if not (ROOT / "tests" / name).exists()] == []


def test_a_report_is_counted(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    assert tally(tmp_path / "report.xml") == (4, 3, 3)


@pytest.mark.parametrize(("wanted", "found"), [("3.10", "3.11"), ("3.11", "3.11"), ("3.12", "3.11"), ("3.13", "3.13")])
def test_the_nearest_python(wanted: str, found: str) -> None:
    assert nearest(wanted, {"3.11": "/a", "3.13": "/b"}) == found


def test_a_python_is_asked_and_not_trusted(tmp_path: Path) -> None:
    shim = tmp_path / "python3.10"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert versions.runs(str(shim)) is None
    assert versions.runs(sys.executable) == f"3.{sys.version_info[1]}"


@pytest.mark.parametrize(
    ("wrong", "failed", "code", "shown"),
    [
        ("", 0, 0, "| 2.11.0 | 3.12 | – | 2.3.5 | 5 | 0 | 1 |"),
        ("", 2, 1, "| 2.11.0 | 3.12 | – | 2.3.5 | 5 | 2 | 1 |"),
        ("cudfast was not installed", 0, 1, "| 2.11.0: cudfast was not installed | 3.12 |"),
    ],
)
def test_one_version_does_not_end_the_run(
    wrong: str,
    failed: int,
    code: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def check(name: str, there: object) -> Row:
        if name == "2.11":
            return Row(name, "3.12", {"torch": "2.11.0", "numpy": "2.3.5"}, 5, failed, 1, wrong)
        return Row(name, "3.13", {"torch": "9.0.0"}, 7)

    monkeypatch.setattr(versions, "check", check)
    monkeypatch.setattr(versions, "pythons", lambda: {"3.12": "/usr/bin/python3.12"})
    monkeypatch.setattr(versions, "HOME", tmp_path)
    assert versions.main(["2.11", "newest"]) == code
    printed = capsys.readouterr().out
    assert shown in printed
    assert "| 9.0.0 | 3.13 | – | – | 7 | 0 | 0 |" in printed


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main(["1.0"])
    assert "1.0: expected some of 2.8, 2.11, 2.13, newest" in capsys.readouterr().err


def test_a_version_without_packages_has_a_line() -> None:
    assert table([Row("2.8", "3.10", {}, wrong="no environment")]).endswith(
        "| 2.8: no environment | 3.10 | – | – | 0 | 0 | 0 |"
    )
