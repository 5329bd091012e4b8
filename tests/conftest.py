"""Fresh memory is NaN in every test, so that unwritten elements are found."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on CPU tensors; before anything imports triton
os.environ.setdefault("CUDFAST_CUDA_EMULATE", "1")  # so do the CUDA kernels, if there was an nvcc to compile them

from cudfast import backends
from cudfast.backends import native

BUILT = [
    name for name in ("native", "triton", "cuda", "reference") if name != "cuda" or backends.available()[name] == ""
]


@pytest.fixture(autouse=True)
def fill_fresh_memory() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=native._native.runnable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs."""
    before = native.isa()
    assert native._native.use_isa(request.param)
    yield request.param
    native._native.use_isa(before)


@pytest.fixture(params=BUILT)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
