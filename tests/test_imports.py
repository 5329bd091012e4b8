"""The structure: no circle of imports, a small root, row/ on its own, and no torch in the native core."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import cudfast

PACKAGE = Path(cudfast.__file__).parent
SOURCES = Path(__file__).parents[1] / "csrc"
FILES = {
    ".".join(("cudfast", *(p for p in file.relative_to(PACKAGE).with_suffix("").parts if p != "__init__"))): file
    for file in PACKAGE.rglob("*.py")
}


def _named(name: str, file: Path) -> Iterator[str]:
    """Every module of the package that an import statement of this one names, those for type checkers included."""
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield full if (full := f"{base}.{alias.name}") in FILES else base


def _runs(name: str, file: Path) -> set[str]:
    """Modules that are imported before this one: those that it names, and the packages around those."""
    found = set()
    for target in _named(name, file):
        parts = target.split(".")
        found |= {".".join(parts[:i]) for i in range(2, len(parts) + 1)}
    return {m for m in found if m in FILES and m != name and not name.startswith(f"{m}.")}


def test_no_circle_of_imports() -> None:
    graph = {name: _runs(name, file) for name, file in FILES.items() if name not in ("cudfast", "cudfast.__main__")}
    assert len(graph) > 60
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_the_root_is_small() -> None:
    modules = sorted(file.name for file in PACKAGE.glob("*.py"))
    assert len(modules) <= 8, modules


def test_the_math_of_a_row_includes_nothing_else() -> None:
    for file in (SOURCES / "row").rglob("*.h"):
        for name in re.findall(r'#include "([^"]+)"', file.read_text()):
            assert (file.parent / name).resolve().is_relative_to(SOURCES / "row"), f"{file.name} includes {name}"


def test_the_native_core_knows_no_torch() -> None:
    files = [file for file in SOURCES.rglob("*") if file.suffix in (".h", ".cpp", ".cu")]
    assert len(files) > 20
    for file in files:
        assert not re.search(r"#include [<\"](torch|ATen|c10|caffe2)/", file.read_text()), file.name


def _is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator) == "triton.jit"


def test_triton_functions_have_few_parameters() -> None:
    """What belongs together is a NamedTuple."""
    found = {
        f"{file.stem}.{node.name}": len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
        for file in (PACKAGE / "backends" / "triton").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list))
    }
    assert len(found) > 60
    assert {name: count for name, count in found.items() if count > 15} == {}


def test_modules_of_earlier_releases() -> None:
    """What was imported, and pickled, by these names."""
    from cudfast.projection import Projection
    from cudfast.sets import ClassSets

    from cudfast.distributed.group import Shard

    assert (Projection, ClassSets) == (cudfast.Projection, cudfast.ClassSets)
    assert Shard("group").group == "group"
