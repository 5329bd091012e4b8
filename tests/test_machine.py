"""The Triton kernels as machine code for GPUs that are not there: no stack, wide accesses, no exponential too many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from cudfast.__main__ import main
from cudfast.inspect import gpu_model

# Kernels are either interpreted or compiled in a process, so this is another one.
CODE = """
import json, sys
from concurrent.futures import ProcessPoolExecutor
from cudfast.backends.triton.compiled import DTYPES, VARIANTS, machine
fused = [i for i, v in enumerate(VARIANTS) if "fused" in v.name]
target = sys.argv[1]
dtypes = ("bf16", "fp16", "fp32") if target == "sm_90" else ("bf16", "fp32")
cases = [(i, dtype, target, 32_000) for i in range(len(VARIANTS)) for dtype in dtypes]
if target == "sm_90":
    cases += [(i, "bf16", target, classes) for i in fused for classes in (256, 512, 1024)]
    cases += [(i, "fp64", target, 32_000) for i in fused if "projected" not in VARIANTS[i].name]
def found(i, dtype, target, classes):
    v, m = VARIANTS[i], machine(VARIANTS[i], dtype, target, classes)
    return {"name": v.name, "dtype": dtype, "target": target, "classes": classes, "size": DTYPES[dtype],
        "exponentials": v.exponentials, "read": v.rows_read, "written": v.rows_written, "looks": v.looks,
        **m._asdict(), "loops": [loop._asdict() for loop in m.loops]}
with ProcessPoolExecutor(2) as pool:
    for each in pool.map(found, *zip(*cases), chunksize=4):
        print(json.dumps(each))
"""


def output(*command: str) -> str:
    """What Python prints where kernels are compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    found = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, env=environment)
    return found.stdout


@pytest.fixture(scope="module", params=list(gpu_model.TARGETS))
def machines(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output("-c", CODE, request.param).splitlines()]


@pytest.mark.parametrize(
    "asked", [pytest.param(["--gpu", "H100"], id="H100"), pytest.param([], id="all", marks=pytest.mark.slow)]
)
def test_the_model_of_every_kernel(asked: list[str]) -> None:
    gpus = asked[1:] or list(gpu_model.GPUS)
    printed = json.loads(output("-m", "cudfast", "gpu-model", "--json", *asked))
    assert [*dict.fromkeys(e["gpu"] for e in printed)] == gpus
    estimates = [e for e in printed if not e["kernel"].startswith(("Liger", "CUDA"))]
    assert len(estimates) == len(gpus) * 2 * 2 * 13
    for e in estimates:
        assert 0 < e["share"] <= 1, e
        assert e["half_rate_per_element"] == 0 if e["gpu"] == "MI300X" else e["half_rate_per_element"] > 1, e
        if (e["gpu"], e["dtype"]) == ("H100", "bf16"):
            assert e["bound"] in ("memory", "bytes in flight"), e
    (fused,) = (
        e
        for e in estimates
        if (e["gpu"], e["dtype"], e["classes"], e["kernel"]) == ("H100", "bf16", 32_000, "student, fused")
    )
    assert fused["bytes_per_element"] == 6
    assert fused["picoseconds"] == pytest.approx(6 / (3.35 * gpu_model.REACHED), rel=1e-6)
    assert fused["share"] == pytest.approx(1)
    text = gpu_model.table([gpu_model.Estimate(**e) for e in printed])
    assert text.startswith("A model, not a measurement")
    assert text.count("\n| H100 ") == sum(e["gpu"] == "H100" for e in printed)
    assert "- H100: NVIDIA H100 SXM data sheet" in text


def test_the_model_names_the_gpus_that_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-model", "--gpu", "H100", "V100"]) == 2
    assert capsys.readouterr().err == "--gpu V100: expected some of A100, H100, H200, B200, MI300X\n"


def test_every_kernel_compiles_for_every_target(machines: list[dict[str, Any]]) -> None:
    assert len({m["name"] for m in machines}) == 13


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
