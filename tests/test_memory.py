"""The pool of large CPU tensors: it reuses pages, is bounded, and disturbs no other memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cudfast
from cudfast.autograd.memory import LARGE, empty
from cudfast.backends.native import _native

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    gc.collect()
    cudfast.empty_cache()
    yield
    cudfast.empty_cache()


def large(mib: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return empty((mib, MIB // dtype.itemsize), dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_same_pages_again(dtype: torch.dtype) -> None:
    first = large(10, dtype)
    assert first.shape == (10, MIB // dtype.itemsize)
    assert first.dtype == dtype
    assert first.isnan().all()  # as torch.empty under deterministic algorithms: tests find unwritten elements
    address = first.data_ptr()
    assert address % (2 * MIB) == 0
    del first
    assert _native.pooled_bytes() == 10 * MIB
    assert large(10, dtype).data_ptr() == address


def test_a_view_keeps_the_pages() -> None:
    first = large(8)
    view = first[3, 5:]
    address = first.data_ptr()
    del first
    assert _native.pooled_bytes() == 0
    assert large(8).data_ptr() != address
    view.zero_()
    assert view.sum() == 0


def test_a_block_serves_down_to_four_fifths_of_its_size() -> None:
    address = (first := large(20)).data_ptr()
    del first
    too_small = large(14)
    assert too_small.data_ptr() != address
    assert large(16).data_ptr() == address
    del too_small
    assert _native.pooled_bytes() == 34 * MIB
    assert large(14).data_ptr() != address  # the smallest that fits
    cudfast.empty_cache()
    assert _native.pooled_bytes() == 0


def test_small_tensors_are_torch_s_own() -> None:
    x = empty((LARGE // 4 - 1,), torch.float32, CPU)
    del x
    assert _native.pooled_bytes() == 0


def test_a_bounded_number_of_blocks_waits() -> None:
    tensors = [large(4) for _ in range(20)]
    del tensors
    assert _native.pooled_bytes() == 16 * 4 * MIB


def test_gradients_come_from_the_pool_and_go_back() -> None:
    teacher, labels = torch.randn(64, 32_000), torch.randint(32_000, (64,))
    student = torch.randn(64, 32_000, requires_grad=True)
    loss = cudfast.CUDLoss(temperature=2.0)
    loss(student, teacher, labels).backward()
    assert student.grad is not None
    first, address = student.grad.clone(), student.grad.data_ptr()
    student.grad = None
    waiting = _native.pooled_bytes()
    assert waiting >= student.nbytes
    loss(student, teacher, labels).backward()
    grad = student.grad
    assert grad is not None
    assert grad.data_ptr() == address
    assert torch.equal(grad, first)


def test_the_optimizer_sees_an_ordinary_gradient() -> None:
    weight = torch.nn.Parameter(torch.randn(32_000, 64))
    plain = torch.nn.Parameter(weight.detach().clone())
    hidden, labels = torch.randn(8, 64), torch.randint(32_000, (8,))
    loss = cudfast.FusedLinearDUSLoss()
    for p in (weight, plain):
        step = torch.optim.AdamW([p], lr=1e-3)
        for _ in range(2):
            step.zero_grad()
            if p is weight:
                loss(hidden, p, labels).backward()
            else:
                cudfast.DUSLoss()(hidden @ p.t(), labels).backward()
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            step.step()
    torch.testing.assert_close(weight, plain, rtol=1e-4, atol=1e-6)


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=30))
@settings(deadline=None, max_examples=30)
def test_live_tensors_never_share_pages(steps: list[tuple[int, bool]]) -> None:
    live: list[tuple[int, torch.Tensor]] = []
    for tag, (mib, release) in enumerate(steps):
        x = large(4 + mib)
        x.fill_(tag)
        live.append((tag, x))
        if release:
            live.pop(0)
        assert all(bool((x == tag).all()) for tag, x in live)


def test_no_memory_is_pytorch_s_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        empty((1 << 30, 1 << 30), torch.float32, CPU)


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


LIMITED = """
import torch
from cudfast.backends.native import _native
from cudfast.autograd.memory import empty
x = empty((8 << 20,), torch.float32, torch.device("cpu"))
del x
print(_native.pooled_bytes())
"""


@pytest.mark.parametrize(("limit", "kept"), [("0", 0), (str(31 * MIB), 0), (str(32 * MIB), 32 * MIB)])
def test_limit(limit: str, kept: int) -> None:
    done = in_a_process(LIMITED, CUDFAST_CACHE_BYTES=limit)
    assert done.stdout.strip() == str(kept), done.stderr


def test_a_limit_that_is_no_number() -> None:
    done = in_a_process(LIMITED, CUDFAST_CACHE_BYTES="1 GiB")
    assert done.returncode != 0
    assert "CUDFAST_CACHE_BYTES='1 GiB': expected a number of bytes >= 0" in done.stderr


FORKED = """
import os, torch
from cudfast.autograd.memory import empty
torch.set_num_threads(1)  # a forked child cannot use the threads of its parent
make = lambda: empty((4, 1 << 20), torch.float32, torch.device("cpu"))
kept, waiting = make().fill_(1), make().fill_(2)
del waiting
child = os.fork()
mine = make().fill_(3 if child else 4)
assert (kept == 1).all() and (mine == (3 if child else 4)).all()
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert (mine == 3).all()
print("both")
"""


def test_after_a_fork_each_process_has_its_own() -> None:
    done = in_a_process(FORKED)
    assert done.stdout.strip() == "both", done.stderr
