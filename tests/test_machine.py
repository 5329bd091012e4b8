"""The Triton kernels as machine code for GPUs that are not there: no stack, wide accesses, no exponential too many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from cudfast import gpu_model

# Kernels are either interpreted or compiled in a process, so this is another one.
CODE = """
import json
from concurrent.futures import ProcessPoolExecutor
from cudfast.backends.triton.compiled import DTYPES, TARGETS, VARIANTS, machine
fused = [i for i, v in enumerate(VARIANTS) if "fused" in v.name]
cases = [(i, dtype, target, 32_000) for i in range(len(VARIANTS)) for dtype in ("bf16", "fp16", "fp32")
         for target in TARGETS if dtype != "fp16" or target == "sm_90"]
cases += [(i, "bf16", "sm_90", classes) for i in fused for classes in (256, 512, 1024)]
cases += [(i, "fp64", "sm_90", 32_000) for i in fused if "projected" not in VARIANTS[i].name]
def found(i, dtype, target, classes):
    v, m = VARIANTS[i], machine(VARIANTS[i], dtype, target, classes)
    return {"name": v.name, "dtype": dtype, "target": target, "classes": classes, "size": DTYPES[dtype],
        "exponentials": v.exponentials, "read": v.rows_read, "written": v.rows_written, "looks": v.looks,
        **m._asdict(), "loops": [loop._asdict() for loop in m.loops]}
with ProcessPoolExecutor(2) as pool:
    for each in pool.map(found, *zip(*cases), chunksize=8):
        print(json.dumps(each))
"""


@pytest.fixture(scope="module")
def machines() -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, env=environment)
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_the_model_is_bound_by_memory_on_an_h100() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "cudfast", "gpu-model", "--json"]
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    estimates = [e for e in printed if not e["kernel"].startswith(("Liger", "CUDA"))]
    assert len(estimates) == 5 * 2 * 2 * 13
    for e in estimates:
        if (e["gpu"], e["dtype"]) == ("H100", "bf16"):
            assert e["bound"] == "memory", e
    (fused,) = (
        e
        for e in estimates
        if (e["gpu"], e["dtype"], e["classes"], e["kernel"]) == ("H100", "bf16", 32_000, "student, fused")
    )
    assert fused["bytes_per_element"] == 6
    assert fused["picoseconds"] == pytest.approx(6 / 3.35, rel=1e-6)
    text = gpu_model.table([gpu_model.Estimate(**e) for e in printed])
    assert text.startswith("A model, not a measurement")
    assert text.count("\n| H100 ") == sum(e["gpu"] == "H100" for e in printed)
    assert "- H100: NVIDIA H100 SXM data sheet" in text


def test_every_kernel_compiles_for_every_target(machines: list[dict[str, Any]]) -> None:
    found = {(m["name"], m["target"]) for m in machines}
    assert len({name for name, _ in found}) == 13
    assert {target for _, target in found} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(found) == 52


def test_no_stack_and_at_most_128_registers(machines: list[dict[str, Any]]) -> None:
    for m in machines:
        assert m["stack"] == 0, m
        assert m["registers"] <= 128, m


def test_accesses_are_16_bytes_wide(machines: list[dict[str, Any]]) -> None:
    for m in machines:
        if m["dtype"] == "fp64":
            continue  # whose exponentials are code, not an instruction: the loops are not told apart
        assert len(m["loops"]) == m["looks"], m  # loops with a narrower one are no main loops
        for loop in m["loops"]:
            assert loop["narrowest"] == 16, m


def test_bytes_and_exponentials_are_those_of_the_method(machines: list[dict[str, Any]]) -> None:
    """Per element: every look reads each array once; one exponential for each array and look."""
    for m in machines:
        if m["dtype"] == "fp64":
            continue
        arrays = m["read"] // len(m["loops"])
        elements = [loop["bytes_read"] / m["size"] / arrays for loop in m["loops"]]
        assert sum(loop["exponentials"] / n for loop, n in zip(m["loops"], elements)) == m["exponentials"], m
        assert sum(loop["bytes_written"] / n / m["size"] for loop, n in zip(m["loops"], elements)) == m["written"], m
