"""Sets of classes against sets of Python ints, and what must be refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cudfast.classes import sets as module
from cudfast.classes.sets import ClassSets

relaxed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def members(sets: ClassSets) -> list[list[int]]:
    return [sets.row(y).tolist() for y in range(len(sets))]


def with_label(expected: list[set[int]], include: bool) -> list[list[int]]:
    return [sorted(row | {y} if include else row - {y}) for y, row in enumerate(expected)]


@st.composite
def lists(draw: st.DrawFn) -> list[list[int]]:
    """Lists of up to 9 classes, some empty, some with a class twice or the label."""
    V = draw(st.integers(1, 9))
    return draw(st.lists(st.lists(st.integers(0, V - 1), max_size=6), min_size=V, max_size=V))


@st.composite
def forests(draw: st.DrawFn) -> list[int]:
    """Parents of up to 14 nodes, a parent before or after its children."""
    M = draw(st.integers(1, 14))
    order = draw(st.permutations(range(M)))
    parent = [-1] * M
    for place in range(1, M):
        parent[order[place]] = draw(st.sampled_from([-1, *order[:place]]))
    return parent


@relaxed
@given(lists(), st.booleans())
def test_from_lists(rows: list[list[int]], include: bool) -> None:
    expected = with_label([set(row) for row in rows], include)
    if not include:
        rows = [[j for j in row if j != y] for y, row in enumerate(rows)]
    sets = ClassSets.from_lists(rows, include_label=include)
    assert members(sets) == expected
    assert sets.offsets.dtype == sets.indices.dtype == torch.int64
    assert sets.num_classes == len(sets) == len(rows)
    assert repr(sets) == f"ClassSets(num_classes={len(rows)}, members={sum(map(len, expected))})"
    assert sets.contains_label().tolist() == [include] * len(rows)


def test_from_lists_of_anything() -> None:
    rows = [{3, 1}, (i for i in (0, 2)), np.array([0], np.uint8), torch.tensor([1, 0])]
    assert members(ClassSets.from_lists(rows)) == [[0, 1, 3], [0, 1, 2], [0, 2], [0, 1, 3]]


@relaxed
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.booleans())
def test_from_groups(groups: list[int], include: bool) -> None:
    expected = with_label([{j for j, other in enumerate(groups) if other == mine} for mine in groups], include)
    assert members(ClassSets.from_groups(groups, include_label=include)) == expected
    assert members(ClassSets.from_groups(np.array(groups, np.int16), include_label=include)) == expected


@relaxed
@given(forests(), st.integers(1, 4), st.booleans(), st.data())
def test_from_taxonomy(parent: list[int], levels: int, include: bool, data: st.DataObject) -> None:
    leaves = [i for i in range(len(parent)) if i not in parent]
    nodes = st.lists(st.integers(0, len(parent) - 1), min_size=1, unique=True)
    classes = data.draw(st.none() | nodes)

    def line(node: int) -> list[int]:
        return [node] if parent[node] < 0 else [node, *line(parent[node])]

    chosen = leaves if classes is None else classes
    tops = [line(node)[: levels + 1][-1] for node in chosen]
    expected = with_label([{j for j, node in enumerate(chosen) if top in line(node)} for top in tops], include)
    assert members(ClassSets.from_taxonomy(parent, classes=classes, levels=levels, include_label=include)) == expected


def test_from_taxonomy_of_one_long_line() -> None:
    sets = ClassSets.from_taxonomy([-1, *range(299)], classes=[0, 299, 150], levels=200)
    assert members(sets) == [[0, 1, 2], [1, 2], [0, 1, 2]]
    assert members(ClassSets.from_taxonomy([-1, 0, 0], levels=2**70)) == [[0, 1], [0, 1]]


@relaxed
@given(st.integers(1, 12), st.integers(1, 14), st.booleans(), st.integers(0, 2**31), st.integers(1, 5))
def test_from_confusion(V: int, k: int, include: bool, seed: int, rows_at_once: int) -> None:
    matrix = np.random.default_rng(seed).integers(0, 4, (V, V))  # many ties, many zeros
    expected = []
    for y, row in enumerate(matrix):
        order = sorted((j for j in range(V) if j != y and row[j] > 0), key=lambda j: (-row[j], j))
        expected.append(set(order[:k]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", rows_at_once * 8 * V)
        for counts in (matrix, matrix.astype(np.float32), matrix.astype(np.uint8), matrix.tolist()):
            assert members(ClassSets.from_confusion(counts, k, include_label=include)) == with_label(expected, include)


@relaxed
@given(st.integers(1, 12), st.integers(1, 14), st.booleans(), st.integers(0, 2**31), st.integers(1, 5))
def test_from_embeddings(V: int, k: int, include: bool, seed: int, rows_at_once: int) -> None:
    vectors = np.random.default_rng(seed).standard_normal((V, 5)) * 10.0 ** np.arange(-V, V, 2)[:, None]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = unit @ unit.T
    expected = [set(sorted((j for j in range(V) if j != y), key=lambda j: -near[y, j])[:k]) for y in range(V)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_BYTES", rows_at_once * 8 * V)
        assert members(ClassSets.from_embeddings(vectors, k, include_label=include)) == with_label(expected, include)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_from_embeddings_ties_and_extremes(dtype: torch.dtype) -> None:
    axes = torch.eye(5, dtype=dtype)[[0, 1, 0, 2, 0]]  # all similarities are 0 or 1
    expected = [[0, 2], [0, 1], [0, 2], [0, 3], [0, 4]]
    assert members(ClassSets.from_embeddings(axes.requires_grad_(), k=1)) == expected
    limits = torch.finfo(dtype)
    scaled = axes.detach() * torch.tensor([limits.max, 1, limits.tiny, limits.tiny, limits.max], dtype=dtype)[:, None]
    assert members(ClassSets.from_embeddings(scaled, k=1)) == expected


def test_progress_bar_is_optional_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def bar(blocks: range, **options: object) -> range:
        seen.append(options)
        return blocks

    vectors = torch.randn(7, 3)
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace(tqdm=bar))
    shown = ClassSets.from_embeddings(vectors, 2)
    assert seen == [{"desc": "class sets", "delay": 2, "leave": False}]
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert members(ClassSets.from_embeddings(vectors, 2)) == members(shown)


@relaxed
@given(lists(), st.data())
def test_expand(rows: list[list[int]], data: st.DataObject) -> None:
    sets = ClassSets.from_lists(rows)
    labels = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    expected = [(n, j) for n, y in enumerate(labels) for j in sets.row(y).tolist()]
    for batch in (torch.tensor(labels, dtype=torch.int64), torch.tensor(labels, dtype=torch.uint8)):
        batch_rows, classes = sets.expand(batch)
        assert batch_rows.dtype == classes.dtype == torch.int64
        assert list(zip(batch_rows.tolist(), classes.tolist())) == expected


@relaxed
@given(lists(), st.data())
def test_overlap(rows: list[list[int]], data: st.DataObject) -> None:
    V = len(rows)
    others = data.draw(st.lists(st.lists(st.integers(0, V - 1), max_size=3), min_size=V, max_size=V))
    mine, theirs = ([[j for j in row if j != y] for y, row in enumerate(some)] for some in (rows, others))
    a, b = (ClassSets.from_lists(some, include_label=False) for some in (mine, theirs))
    expected = next((y for y in range(V) if set(mine[y]) & set(theirs[y])), None)
    assert a.overlap(b) == b.overlap(a) == expected
    assert a.overlap(ClassSets.from_lists(mine)) == next((y for y in range(V) if mine[y]), None)


def test_contains_label_class_by_class() -> None:
    sets = ClassSets(torch.tensor([0, 2, 2, 4]), torch.tensor([0, 2, 0, 1]))
    assert sets.contains_label().tolist() == [True, False, False]


def test_move() -> None:
    sets = ClassSets.from_groups([0, 0])
    assert sets.to("cpu") is sets
    assert sets.to(torch.device("cpu")) is sets


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_constructor_on_a_gpu() -> None:
    vectors, groups, parent = torch.randn(30, 4), torch.randint(5, (30,)), torch.tensor([-1, 0, 0, 1, 1, 2])
    counts = torch.randint(4, (30, 30))
    makers: list[tuple[Callable[[Tensor], ClassSets], Tensor]] = [
        (lambda x: ClassSets.from_embeddings(x, 3), vectors),
        (ClassSets.from_groups, groups),
        (ClassSets.from_taxonomy, parent),
        (lambda x: ClassSets.from_confusion(x, 3), counts),
    ]
    for make, given_tensor in makers:
        sets, moved = make(given_tensor), make(given_tensor.cuda())
        assert moved.indices.is_cuda
        assert members(sets) == members(moved) == members(sets.to("cuda"))
        assert moved.overlap(sets.to("cuda")) == 0
        labels = torch.arange(len(sets)).flip(0)
        assert [t.tolist() for t in sets.expand(labels)] == [t.tolist() for t in moved.expand(labels.cuda())]
        assert moved.contains_label().all()
        with pytest.raises(ValueError, match=r"labels is on cpu and the sets on cuda:0: move one of them"):
            moved.expand(labels)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


SETS = ClassSets.from_groups([0, 0, 1])
REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: ClassSets([0], ints()), TypeError, "offsets: expected a torch.Tensor, got list"),  # type: ignore[arg-type]
    (
        lambda: ClassSets(ints(0, 1), ints(0).int()),
        TypeError,
        "indices has dtype torch.int32: expected int64; call .long() first",
    ),
    (
        lambda: ClassSets(ints(0, 9, 1)[::2], ints(0)),
        ValueError,
        "offsets has shape (2,) and strides (2,): expected one dense axis",
    ),
    (
        lambda: ClassSets(ints(0), ints()),
        ValueError,
        "offsets has shape (1,): expected (V + 1,) with at least one class",
    ),
    (
        lambda: ClassSets(ints(1, 2), ints(0, 0)),
        ValueError,
        "offsets runs from 1 to 2: expected 0 to 2, the length of indices",
    ),
    (
        lambda: ClassSets(ints(0, 2, 1, 2), ints(0, 1)),
        ValueError,
        "offsets falls from 2 to 1 at class 1: expected it to rise",
    ),
    (
        lambda: ClassSets(ints(0, 0, 2), ints(0, 2)),
        ValueError,
        "the set of class 1 holds 2: expected a class in [0, 2)",
    ),
    (
        lambda: ClassSets(ints(0, 0, 1, 3, 3), ints(3, 1, 1)),
        ValueError,
        "the set of class 2 holds 1 after 1: expected ascending and unique classes; ClassSets.from_lists takes them in "
        "any order",
    ),
    (lambda: SETS.row(3), IndexError, "row(3): expected a class in [0, 3)"),
    (lambda: SETS.row(-1), IndexError, "row(-1): expected a class in [0, 3)"),
    (lambda: SETS.expand(ints(0, 3)), ValueError, "labels[1] = 3: expected a class in [0, 3)"),
    (lambda: SETS.expand(torch.ones(2)), TypeError, "labels has dtype torch.float32: expected integers"),
    (
        lambda: SETS.expand([0]),  # type: ignore[arg-type]
        TypeError,
        "labels: expected a torch.Tensor of class indices (N,), got list",
    ),
    (
        lambda: SETS.overlap(ClassSets.from_groups([0])),
        ValueError,
        "the sets have 3 and 1 classes: expected the same number",
    ),
    (
        lambda: SETS.expand(ints(0).to("meta")),
        ValueError,
        "labels is on meta and the sets on cpu: move one of them, e.g. sets.to('meta')",
    ),
    (
        lambda: ClassSets.from_lists([]),
        ValueError,
        "lists is empty: expected one list of classes for every class",
    ),
    (lambda: ClassSets.from_lists([[1], [2]]), ValueError, "lists[1] holds 2: expected a class in [0, 2)"),
    (
        lambda: ClassSets.from_lists([[1], [0, 1]], include_label=False),
        ValueError,
        "lists[1] holds class 1 itself, with include_label=False: remove it, or pass include_label=True",
    ),
    (
        lambda: ClassSets.from_groups([]),
        ValueError,
        "labels_of_classes has shape (0,): expected (V,) with at least 1",
    ),
    (lambda: ClassSets.from_groups([0.5]), TypeError, "labels_of_classes has dtype torch.float32: expected integers"),
    (
        lambda: ClassSets.from_groups([7, 7, *[5] * 46_341]),
        ValueError,
        "the sets would hold 2,147,488,285 members, more than 2**31: the largest, group 5, has 46,341 classes, each a "
        "member of every other's set; split it",
    ),
    (
        lambda: ClassSets.from_taxonomy([-1, 0, *[1] * 50_000]),
        ValueError,
        "the sets would hold 2,500,000,000 members, more than 2**31: the largest, the subtree of node 1, has 50,000 "
        "classes, each a member of every other's set; split it",
    ),
    (
        lambda: ClassSets.from_taxonomy([-1, 2]),
        ValueError,
        "parent[1] = 2: expected a node in [0, 2), or -1 at a root",
    ),
    (
        lambda: ClassSets.from_taxonomy([-1, 0, 2, 2]),
        ValueError,
        "parent has a cycle through node 2: expected every node to lead to a root, marked -1",
    ),
    (
        lambda: ClassSets.from_taxonomy([-1, 0], classes=[1, 2]),
        ValueError,
        "classes[1] = 2: expected a node in [0, 2)",
    ),
    (
        lambda: ClassSets.from_taxonomy([-1, 0], classes=[1, 0, 1]),
        ValueError,
        "classes holds node 1 more than once: expected one class for a node",
    ),
    (lambda: ClassSets.from_taxonomy([-1], levels=0), ValueError, "levels=0: expected an int of at least 1"),
    (
        lambda: ClassSets.from_embeddings([[1], [2]], 1),
        TypeError,
        "class_vectors has dtype torch.int64: expected floating point",
    ),
    (
        lambda: ClassSets.from_embeddings(torch.ones(3), 1),
        ValueError,
        "class_vectors has shape (3,): expected (V, D), both at least 1",
    ),
    (
        lambda: ClassSets.from_embeddings([[1.0, 0.0], [0.0, 0.0]], 1),
        ValueError,
        "class_vectors[1] is zero: expected a finite vector with a direction for every class",
    ),
    (
        lambda: ClassSets.from_embeddings([[1.0, 0.0], [1.0, torch.nan]], 1),
        ValueError,
        "class_vectors[1] holds NaN or infinity: expected a finite vector with a direction for every class",
    ),
    (lambda: ClassSets.from_embeddings(torch.ones(2, 2), 0), ValueError, "k=0: expected an int of at least 1"),
    (
        lambda: ClassSets.from_embeddings(torch.ones(2, 2), 1.0),  # type: ignore[arg-type]
        TypeError,
        "k: expected an int, got float",
    ),
    (
        lambda: ClassSets.from_confusion(torch.ones(2, 3), 1),
        ValueError,
        "matrix has shape (2, 3): expected (V, V) with at least one class",
    ),
    (lambda: ClassSets.from_confusion([[0, 1], [-1, 0]], 1), ValueError, "matrix[1, 0] = -1: expected a count >= 0"),
    (
        lambda: ClassSets.from_confusion([[0, torch.nan], [1, 0]], 1),
        ValueError,
        "matrix[0, 1] = nan: expected a count >= 0",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_refused(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("value", ["ab", [[1], [1, 2]], [2**70], None])
def test_what_is_no_tensor(value: object) -> None:
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"^matrix: expected counts \(V, V\), got {kind} \(.+"):
        ClassSets.from_confusion(value, 1)
    with pytest.raises(TypeError, match=rf"^parent: expected integers \(M,\), got {kind} \(.+"):
        ClassSets.from_taxonomy(value)


@pytest.mark.parametrize("row", [[1.0], [2**70], 3, "a", [torch.tensor(0.5)]])
def test_what_is_no_list_of_ints(row: object) -> None:
    with pytest.raises(TypeError, match=r"^lists\[1\]: expected an iterable of int classes in \[0, 2\) \(.+"):
        ClassSets.from_lists([[0], row])  # type: ignore[list-item]


@pytest.mark.parametrize("parent", [[0], [1, 2, 0], [-1, 0, 3, 4, 2, 2, 5], [5, 0, 1, 2, 3, 5]])
def test_a_cycle_is_named_by_a_node_on_it(parent: list[int]) -> None:
    with pytest.raises(ValueError, match=r"parent has a cycle through node \d+") as caught:
        ClassSets.from_taxonomy(parent)
    named = int(str(caught.value).split("node ")[1].split(":")[0])
    node = parent[named]
    for _ in parent:
        if node == named:
            return
        node = parent[node]
    pytest.fail(f"node {named} is on no cycle")


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        SETS.indices = ints()  # type: ignore[misc]
