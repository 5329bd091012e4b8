"""The pages that a reader meets first: their links, examples, commands and tables are those of the code."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import cudfast
from cudfast import CUDLoss, DUSLoss, FusedLinearCUDLoss, FusedLinearDUSLoss, Projection, WClip

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs" / "README.md").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
PAGES = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")]
)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def read(name: str | Path) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links(page: Path) -> None:
    """Every relative link names a file, and the part behind # a heading of it."""
    text = CODE.sub("", read(page))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "mailto:")):
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (heading and heading not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", ["README.md", "docs/linear.md"])
def test_examples_run(page: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_the_first_page_is_short() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= 120
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(example.splitlines()) <= 12


def test_the_first_page_has_the_requirements_of_the_package() -> None:
    project, text = read("pyproject.toml"), read("README.md")
    for name, field in (("Python", r'requires-python = ">=([\d.]+)"'), ("PyTorch", r'"torch>=([\d.]+)"')):
        found = re.search(field, project)
        assert found
        assert f"{name} {found[1]} or newer" in text


def test_the_index_names_every_page() -> None:
    listed = re.findall(r"^- \[(.*?)\]\((.*?)\): ", read("docs/README.md"), re.MULTILINE)
    assert all(name == target for name, target in listed)
    assert sorted(name for name, _ in listed) == sorted(
        page.name for page in PAGES if page.parent.name == "docs" and page.name != "README.md"
    )


def test_help_lists_every_target() -> None:
    text = read("Makefile")
    (targets,) = re.findall(r"^\.PHONY: (help .*)$", text, re.MULTILINE)
    listed = re.findall(r"^## make (\S+) ", text, re.MULTILINE)
    assert sorted(["help", *listed]) == sorted(targets.split())
    for command in re.findall(r"`make ([a-z0-9-]+)", read("README.md") + read("CONTRIBUTING.md")):
        assert command in targets.split(), command
    if shutil.which("make") is None:
        pytest.skip("needs make")
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == [line[2:].lstrip() for line in text.splitlines() if line.startswith("##")]


def options(page: str, table: str) -> dict[str, str]:
    """Option -> default, from the table of docs/options.md whose head starts with `table`."""
    body = re.search(rf"^\| {re.escape(table)} \| default .*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert body, table
    found = {}
    for row in body[1].splitlines():
        names, default = [cell.strip() for cell in row.split(" | ")][:2]
        keys = re.findall(r"`(\w+)`", names)
        defaults = default.split(", ") if len(default.split(", ")) == len(keys) else [default] * len(keys)
        found.update(zip(keys, defaults, strict=True))
    return found


@pytest.mark.parametrize(
    ("owner", "tables"),
    [
        (CUDLoss, ["`CUDLoss`", "both"]),
        (DUSLoss, ["`DUSLoss`", "both"]),
        (WClip, ["`WClip`"]),
        (Projection, ["`Projection`"]),
        (FusedLinearCUDLoss, ["`CUDLoss`", "both", "from hidden states"]),
        (FusedLinearDUSLoss, ["`DUSLoss`", "both", "from hidden states"]),
    ],
)
def test_the_tables_of_options_are_those_of_the_code(owner: type, tables: list[str]) -> None:
    page = read("docs/options.md")
    written: dict[str, str] = {}
    for table in tables:
        written |= options(page, table)
    if owner is FusedLinearDUSLoss:
        written = {name.replace("student_", ""): text for name, text in written.items() if "teacher_" not in name}
    if "from hidden states" in tables:
        del written["inplace"]
    scope = {"WClip": WClip, "torch": __import__("torch")}
    parameters = {name: p.default for name, p in inspect.signature(owner).parameters.items()}
    assert {name: eval(text.strip("`"), scope) for name, text in written.items()} == parameters


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {cudfast.__version__}" in read("CHANGELOG.md")


def test_the_forms_and_the_workflow_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    files = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/*/*.yml")}
    assert sorted(files) == ["bug", "ci", "config", "feature"]
    for form in (files["bug"], files["feature"]):
        assert {"name", "description", "body"} <= form.keys()
        fields = [field["id"] for field in form["body"]]
        assert len(set(fields)) == len(fields)
    assert any("python -m cudfast info" in field["attributes"]["label"] for field in files["bug"]["body"])
    assert files["ci"]["permissions"] == {"contents": "read"}
    assert {"push", "pull_request"} == files["ci"][True].keys()  # YAML's `on`
    steps = files["ci"]["jobs"]["ci"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_citation_has_what_the_format_requires() -> None:
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["version"] == cudfast.__version__
    paper = cited["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert [author["family-names"] for author in paper["authors"]] == ["Kim", "Kim", "Xuan", "Cho"]
    assert paper["url"] == "https://arxiv.org/abs/2602.12687"
    assert paper["url"] in read("README.md")
