"""Bad input: the type of the error and its exact words, before any kernel runs."""

from __future__ import annotations

import re
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from cudfast import CUDLoss, CUDOptions, DUSLoss, DUSOptions, WClip, backends
from cudfast.functional import cud_loss, dus_loss

G, G35 = torch.empty(21), torch.randn(70)
S, T, Y = torch.randn(4, 7), torch.randn(4, 7), torch.tensor([0, 1, 2, 3])


CASES: list[tuple[type[Exception], str, Callable[[], object]]] = [
    (TypeError, "student_logits: expected a torch.Tensor of logits (..., V), got list", lambda: cud_loss([1.0], T, Y)),
    (
        TypeError,
        "student_logits has dtype torch.int64: expected one of float32, float64, bfloat16, float16",
        lambda: cud_loss(S.long(), T, Y),
    ),
    (
        TypeError,
        "teacher_logits has layout torch.sparse_coo: expected a dense (strided) tensor; call .to_dense() first",
        lambda: cud_loss(S, T.to_sparse(), Y),
    ),
    (
        ValueError,
        "student_logits has shape (): expected (..., V) with at least one class",
        lambda: cud_loss(torch.tensor(1.0), T, Y),
    ),
    (
        ValueError,
        "student_logits has shape (4, 0): expected (..., V) with at least one class",
        lambda: cud_loss(S[:, :0], T[:, :0], Y),
    ),
    (
        TypeError,
        "teacher_logits is None: expected logits (..., V), unless kd_weight=0 and return_stats=False",
        lambda: cud_loss(S, None, Y),
    ),
    (
        ValueError,
        "teacher_logits requires grad, and no gradient flows to the teacher: run the teacher under "
        "torch.no_grad(), or pass teacher_logits.detach()",
        lambda: cud_loss(S, T.clone().requires_grad_(), Y),
    ),
    (
        ValueError,
        "student_logits has 7 classes and teacher_logits has 6: expected the same width. If one of them is "
        "padded, pass num_classes=6 (the number of real classes)",
        lambda: cud_loss(S, T[:, :6], Y),
    ),
    (
        ValueError,
        "num_classes=9 is more than the 7 classes of student_logits",
        lambda: cud_loss(S, T, Y, CUDOptions(num_classes=9)),
    ),
    (
        ValueError,
        "student_logits has shape (4, 7) and teacher_logits (3, 7): expected the same leading shape",
        lambda: cud_loss(S, T[:3], Y),
    ),
    (
        ValueError,
        "student_logits is on cpu and teacher_logits on meta: move them to one device",
        lambda: cud_loss(S, T.to("meta"), Y),
    ),
    (
        TypeError,
        "labels: expected a torch.Tensor of class indices (...), got list",
        lambda: cud_loss(S, T, [0, 1, 2, 3]),
    ),
    (
        TypeError,
        "labels has dtype torch.float32: expected int64 class indices (class probabilities belong to the teacher)",
        lambda: cud_loss(S, T, Y.float()),
    ),
    (
        ValueError,
        "labels has shape (3,): expected (4,), that of student_logits without its last axis",
        lambda: cud_loss(S, T, Y[:3]),
    ),
    (
        ValueError,
        "labels is on meta and student_logits on cpu: move them to one device",
        lambda: cud_loss(S, T, Y.to("meta")),
    ),
    (
        ValueError,
        "labels[3] = 7: expected a class in [0, 7), ignore_index=-100 or unlabeled_index=-1; if the labels are "
        "1-based, pass labels - 1",
        lambda: cud_loss(S, T, torch.tensor([0, 1, -1, 7])),
    ),
    (
        ValueError,
        "labels[1, 0] = -2: expected a class in [0, 7), ignore_index=-100",
        lambda: dus_loss(S.view(2, 2, 7), torch.tensor([[0, 1], [-2, 3]])),
    ),
    (
        ValueError,
        "labels[2] = 6: expected a class in [0, 6), ignore_index=-100 or unlabeled_index=-1; if the labels are "
        "1-based, pass labels - 1",
        lambda: cud_loss(S, T, torch.tensor([0, 1, 6, 2]), CUDOptions(num_classes=6)),
    ),
    (
        TypeError,
        "weight: expected a torch.Tensor with one weight per row, got list",
        lambda: cud_loss(S, T, Y, weight=[1.0]),
    ),
    (
        TypeError,
        "weight has dtype torch.complex64: expected real numbers",
        lambda: cud_loss(S, T, Y, weight=Y.to(torch.complex64)),
    ),
    (
        ValueError,
        "labels has shape (2, 5) and student_logits (2, 7, 5), with its classes along axis 1, as in "
        "nn.CrossEntropyLoss: expected classes last, pass student_logits.movedim(1, -1) (and likewise every other "
        "logits)",
        lambda: cud_loss(G35.view(2, 7, 5), G35.view(2, 7, 5), torch.zeros(2, 5, dtype=torch.int64)),
    ),
    (
        ValueError,
        "num_items=0, and row 1 counts: expected the number of labels that are not ignore_index, in all the batches "
        "that one step accumulates",
        lambda: cud_loss(S, T, torch.tensor([-100, 1, 2, 3]), num_items=0),
    ),
    (
        ValueError,
        "num_items=0, and row 0 counts: expected the number of labels that are not ignore_index, in all the batches "
        "that one step accumulates",
        lambda: dus_loss(S, Y, num_items=torch.tensor(0)),
    ),
    (
        ValueError,
        "weight[1] = -0.5: expected a finite number >= 0",
        lambda: cud_loss(S, T, Y, weight=torch.tensor([1.0, -0.5, 1, 1])),
    ),
    (
        ValueError,
        "weight requires grad, and no gradient flows to it: pass weight.detach()",
        lambda: cud_loss(S, T, Y, weight=torch.ones(4, requires_grad=True)),
    ),
    (
        ValueError,
        "temperature[2] = 0.0: expected a number in [0.0001, 10000]",
        lambda: cud_loss(S, T, Y, temperature=torch.tensor([1.0, 2, 0, 1])),
    ),
    (ValueError, "temperature=-1: expected a number in [0.0001, 10000]", lambda: cud_loss(S, T, Y, temperature=-1)),
    (
        TypeError,
        "temperature: expected a number or a tensor (...), got str",
        lambda: cud_loss(S, T, Y, temperature="hot"),
    ),
    (ValueError, "num_items=-3: expected a finite number >= 0", lambda: cud_loss(S, T, Y, num_items=-3)),
    (
        ValueError,
        "num_items is torch.float32 (2,): expected one number",
        lambda: cud_loss(S, T, Y, num_items=torch.ones(2)),
    ),
    (
        ValueError,
        "num_items=nan: expected a finite number >= 0",
        lambda: cud_loss(S, T, Y, num_items=torch.tensor(torch.nan)),
    ),
    (
        ValueError,
        "grad_out has shape (2, 2, 7) and strides (7, 7, 1): expected rows that are dense and do not overlap, to write "
        "a gradient into; call .contiguous() first",
        lambda: cud_loss(
            S.view(2, 2, 7), None, None, CUDOptions(kd_weight=0), grad_out=G.as_strided((2, 2, 7), (7, 7, 1))
        ),
    ),
    (
        ValueError,
        "alpha requires grad, and no gradient flows to it: pass alpha.detach()",
        lambda: dus_loss(S, Y, alpha=torch.ones(7, requires_grad=True)),
    ),
    (
        TypeError,
        "num_items: expected a number or a tensor of one, got str",
        lambda: cud_loss(S, T, Y, num_items="many"),
    ),
    (TypeError, "options: expected CUDOptions, got DUSOptions", lambda: cud_loss(S, T, Y, DUSOptions())),
    (
        TypeError,
        "labels is None: the teacher loss needs a label (or ignore_index) for every row",
        lambda: dus_loss(S, None),
    ),
    (
        ValueError,
        "alpha is torch.float32 (6,): expected floating point (7,)",
        lambda: dus_loss(S, Y, alpha=torch.ones(6)),
    ),
    (
        ValueError,
        "alpha of the label of row 2 is -1.0: expected a finite number > 0",
        lambda: dus_loss(S, Y, alpha=torch.tensor([1.0, 1, -1, 1, 1, 1, 1])),
    ),
    (
        ValueError,
        "inplace=True would overwrite student_logits, a leaf that requires grad (a parameter or an input you "
        "keep): use inplace=False, or pass the output of a layer",
        lambda: CUDLoss(inplace=True)(S.clone().requires_grad_(), T, Y),
    ),
    (
        ValueError,
        "student_logits shares memory with teacher_logits, which would be overwritten: clone one of them",
        lambda: CUDLoss(inplace=True)((s := S * 1), s, Y),
    ),
    (
        ValueError,
        "student_logits has shape (4, 7) and strides (0, 1): expected rows that are dense and do not overlap, "
        "to write a gradient into; call .contiguous() first",
        lambda: CUDLoss(inplace=True)(S[:1].expand(4, 7), T, Y),
    ),
    (
        ValueError,
        "grad_out is torch.float32 (4, 6) on cpu: expected torch.float32 (4, 7) on cpu, as student_logits",
        lambda: cud_loss(S, T, Y, grad_out=torch.empty(4, 6)),
    ),
    (
        ValueError,
        "grad_out shares memory with student_logits: use inplace=True to write the gradient over it",
        lambda: cud_loss(S, T, Y, grad_out=S),
    ),
    (
        ValueError,
        "grad_out shares memory with teacher_logits, which would be overwritten: clone one of them",
        lambda: cud_loss(S, T, Y, grad_out=T),
    ),
    (
        ValueError,
        "grad_out requires grad: expected plain memory, e.g. torch.empty_like(logits)",
        lambda: cud_loss(S, T, Y, grad_out=torch.empty(4, 7, requires_grad=True)),
    ),
    (
        ValueError,
        "inplace=True and grad_out were both given: the gradient can go to one place only",
        lambda: cud_loss(S * 1, T, Y, CUDOptions(inplace=True), grad_out=torch.empty(4, 7)),
    ),
    (
        ValueError,
        "CUDOptions(temperature=0): expected a finite number in [0.0001, 10000]; for cross-entropy alone, pass "
        "kd_weight=0",
        lambda: CUDLoss(0),
    ),
    (
        ValueError,
        "CUDOptions(reduction='maen'): expected one of 'none', 'sum', 'mean'; did you mean 'mean'?",
        lambda: CUDLoss(reduction="maen"),
    ),
    (
        ValueError,
        "labels[0] = -1: expected a class in [0, 7), ignore_index=-100; to ignore rows without a label, give them the "
        "label -100",
        lambda: dus_loss(S, Y - 1),
    ),
    (
        ValueError,
        "labels[0] = -100: expected a class in [0, 7), ignore_index=0 or unlabeled_index=-1; to ignore rows with label "
        "-100, pass ignore_index=-100",
        lambda: cud_loss(S, T, torch.full((4,), -100), CUDOptions(ignore_index=0)),
    ),
    (
        ValueError,
        "labels has shape (7,): expected (4,), that of student_logits without its last axis; if its classes are the "
        "first axis, pass student_logits.movedim(0, -1)",
        lambda: cud_loss(S, T, torch.zeros(7, dtype=torch.int64)),
    ),
    (
        ValueError,
        "CUDOptions(temperature=nan): expected a finite number in [0.0001, 10000]",
        lambda: CUDLoss(float("nan")),
    ),
    (TypeError, "CUDOptions(temperature=...): expected a number, got str", lambda: CUDLoss("2")),
    (ValueError, "CUDOptions(kd_weight=-0.1): expected a finite number in [0, inf)", lambda: CUDLoss(kd_weight=-0.1)),
    (
        ValueError,
        "CUDOptions(ce_weight=inf): expected a finite number in [0, inf)",
        lambda: CUDLoss(ce_weight=float("inf")),
    ),
    (
        TypeError,
        "calibration='wclip': expected WClip(budget, margin), Projection(...) or None",
        lambda: CUDLoss(calibration="wclip"),
    ),
    (
        ValueError,
        "WClip(budget=1): expected a finite number in [0, 1): the top-1 keeps some of its mass",
        lambda: WClip(budget=1),
    ),
    (ValueError, "WClip(margin=0): expected a finite number in (0, 1]", lambda: WClip(margin=0)),
    (
        ValueError,
        "CUDOptions(reduction='avg'): expected one of 'none', 'sum', 'mean'",
        lambda: CUDLoss(reduction="avg"),
    ),
    (ValueError, "CUDOptions(save='all'): expected one of 'auto', 'state', 'gradient'", lambda: CUDLoss(save="all")),
    (
        ValueError,
        "CUDOptions(backend='gpu'): expected one of 'auto', 'reference', 'native', 'triton', 'cuda'",
        lambda: CUDLoss(backend="gpu"),
    ),
    (
        ValueError,
        "unlabeled_index and ignore_index are both -1: expected two different values; pass unlabeled_index=None where "
        "no label means that a row has none",
        lambda: CUDLoss(ignore_index=-1),
    ),
    (TypeError, "CUDOptions(ignore_index=...): expected an int, got float", lambda: CUDLoss(ignore_index=1.5)),
    (ValueError, "num_classes=0: expected at least 1, or None for every column", lambda: CUDLoss(num_classes=0)),
    (
        ValueError,
        "DUSOptions(gate_threshold=1.5): expected a finite number in [0, 1]",
        lambda: DUSLoss(gate_threshold=1.5),
    ),
    (ValueError, "DUSOptions(alpha=0.0): expected a finite number in (0, inf)", lambda: DUSLoss(alpha=0)),
    (
        ValueError,
        "backend 'native' works on CPU tensors, got logits on meta; use backend='auto' or 'reference'",
        lambda: cud_loss(S.to("meta"), T.to("meta"), None, CUDOptions(backend="native")),
    ),
]


@pytest.mark.parametrize(("kind", "words", "call"), CASES, ids=[words[:60] for _, words, _ in CASES])
def test_bad_input(kind: type[Exception], words: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=f"^{re.escape(words)}$"):
        call()


@pytest.mark.parametrize("labels", [[0, 1, -1, 7], [9, 0, 0, 0]])
def test_both_backends_refuse_the_same_row(labels: list[int]) -> None:
    words = []
    for backend in ("native", "reference"):
        with pytest.raises(ValueError, match="expected a class in") as error:
            cud_loss(S, T, torch.tensor(labels), CUDOptions(backend=backend))
        words.append(str(error.value))
    assert words[0] == words[1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_finite_names_the_row(backend: str, value: float) -> None:
    logits = torch.randn(2, 3, 7)
    logits[1, 0, 2] = value
    labels = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^row 1, 0 holds NaN, \+inf, or nothing but -inf"):
        CUDLoss(check_finite=True, backend=backend)(logits, torch.randn(2, 3, 7), labels)
    with pytest.raises(ValueError, match=r"^row 1, 0 holds NaN"):
        DUSLoss(check_finite=True, backend=backend)(logits.requires_grad_(), labels)
    labels[1, 0] = -100
    CUDLoss(check_finite=True, backend=backend)(logits, torch.randn(2, 3, 7), labels)


@pytest.fixture
def _fresh_choice() -> Iterator[None]:
    """The choice of a backend is remembered; a test that changes what there is must not be."""
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


@pytest.mark.usefixtures("_fresh_choice")
def test_a_backend_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda name: "no C++ compiler found" if name == "native" else real(name))
    with pytest.raises(RuntimeError, match=r"^backend 'native' is not available: no C\+\+ compiler found$"):
        backends.choose("native", torch.device("cpu"))
    with pytest.warns(RuntimeWarning, match=r"reference backend, which is much slower: no C\+\+ compiler found$"):
        assert backends.choose("auto", torch.device("cpu")) is real("reference")
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert backends.choose("auto", torch.device("cpu")) is real("reference")


@pytest.mark.usefixtures("_fresh_choice")
def test_the_environment_sets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDFAST_BACKEND", "reference")
    assert backends.choose("auto", torch.device("cpu")) is backends.load("reference")
    assert backends.choose("native", torch.device("cpu")) is backends.load("native")
    backends.choose.cache_clear()
    monkeypatch.setenv("CUDFAST_BACKEND", "cublas")
    with pytest.raises(
        ValueError, match=r"^CUDFAST_BACKEND='cublas': expected one of auto, native, triton, cuda, reference$"
    ):
        backends.choose("auto", torch.device("cpu"))


@pytest.mark.usefixtures("_fresh_choice")
@pytest.mark.parametrize(
    ("kind", "properties", "message"),
    [
        ("cuda", {"major": 6, "minor": 1}, "Some GPU has compute capability 6.1, and Triton needs 7.0 or newer"),
        ("xpu", {"has_fp64": False}, "Some GPU has no float64, which the scalars of a row need"),
    ],
)
def test_a_gpu_that_triton_cannot_use(
    monkeypatch: pytest.MonkeyPatch, kind: str, properties: dict[str, object], message: str
) -> None:
    found = types.SimpleNamespace(name="Some GPU", **properties)
    module = types.SimpleNamespace(get_device_properties=lambda device: found)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    real, device = backends.load, torch.device(kind, 7)
    monkeypatch.setattr(backends, "load", lambda name: object() if name == "triton" else real(name))
    with pytest.raises(ValueError, match=re.escape(f"backend 'triton' does not work on this GPU ({message}), got")):
        backends.choose("triton", device)
    with pytest.warns(RuntimeWarning, match=f"reference backend, which is much slower: {message}"):
        assert backends.choose("auto", device) is real("reference")
