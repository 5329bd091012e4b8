"""The model's arithmetic, on machine code that was made up."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from cudfast import backends
from cudfast.inspect import gpu_model, machine
from cudfast.inspect.gpu_model import GPUS, REACHED, Estimate, Kernel
from cudfast.inspect.machine import Loop, Machine

V = 32_000
NEEDED = REACHED * 4.8e12 * gpu_model.LATENCY / 132  # bytes in flight on a processor of an H200
FOLD = Loop(80, 0, 32, 0, 16)  # 8 columns of two bf16 matrices
MAP = Loop(80, 0, 32, 16, 16)


def of(found: Machine, looks: int = 2, classes: int = V, cluster: int = 1) -> Estimate:
    """A kernel with 8 columns a thread, on an H200."""
    written = tuple(loop.bytes_written / 8 for loop in found.loops)
    about = Kernel("it", 2, looks, (8.0,) * len(found.loops), written, cluster)
    return gpu_model.estimate(about, found, "bf16", classes, "H200")


def test_a_light_kernel_is_as_fast_as_memory() -> None:
    found = of(Machine(32, 0, 0, 256, (Loop(8, 0, 32, 16, 16),)))
    assert (found.bytes_per_element, found.bound, found.in_flight) == (6, "memory", 1)
    assert found.share == pytest.approx(1)
    assert found.picoseconds == pytest.approx(6 / (REACHED * 4.8))


def test_occupancy_follows_from_registers_threads_and_shared_memory() -> None:
    for registers, shared, threads, programs in (
        (32, 0, 256, 8), (33, 0, 256, 6), (128, 0, 512, 1), (32, 100 << 10, 256, 2), (32, 227 << 10, 256, 1)
    ):  # fmt: skip
        assert of(Machine(registers, 0, shared, threads, (FOLD, MAP))).programs == programs


def test_too_few_bytes_in_flight_slow_the_reads() -> None:
    found = of(Machine(128, 0, 0, 512, (Loop(8, 0, 16, 16, 16),)))
    assert found.programs == 1
    assert found.in_flight == pytest.approx(16 * 512 / NEEDED)
    assert found.bound == "bytes in flight"
    seconds = (4 / found.in_flight + 2) / (REACHED * 4.8)
    assert found.picoseconds == pytest.approx(seconds)
    staged = of(Machine(128, 0, 0, 512, (Loop(8, 0, 16, 16, 16, copied=True),)))
    assert staged.in_flight == 1


def test_one_program_overlaps_nothing() -> None:
    """Two programs: the longest sum. One: the sum of the longest, here instructions, then memory."""
    loops = Loop(400, 0, 64, 0, 16), Loop(8, 0, 64, 16, 16)
    slots = [loop.instructions / 8 / GPUS["H200"].instructions * 1e12 for loop in loops]
    memory = [4 / (REACHED * 4.8), 2 / (REACHED * 4.8)]  # the second look is in L2
    two, one = (of(Machine(registers, 0, 0, 512, loops)) for registers in (64, 128))
    assert (two.programs, one.programs) == (2, 1)
    assert two.picoseconds == pytest.approx(max(sum(slots), sum(memory)))
    assert one.picoseconds == pytest.approx(slots[0] + memory[1])
    assert two.share > one.share


def test_the_second_look_costs_where_l2_does_not_hold_the_rows() -> None:
    found = Machine(32, 0, 0, 256, (FOLD, MAP))
    assert [of(found, classes=v).bytes_per_element for v in (4_000, 262_144)] == [6, 10]
    assert of(found, looks=1, classes=262_144).bytes_per_element == 6


def test_comparisons_run_at_half_the_rate() -> None:
    loops = (Loop(400, 0, 64, 16, 16, half_rate=300),)
    found = of(Machine(32, 0, 0, 256, loops))
    assert (found.bound, found.half_rate_per_element) == ("half-rate instructions", 37.5)
    assert found.picoseconds == pytest.approx(2 * 37.5 / GPUS["H200"].instructions * 1e12)
    on_a100 = gpu_model.estimate(Kernel("it", 2, 1, (8.0,), (2.0,)), Machine(32, 0, 0, 256, loops), "bf16", V, "A100")
    assert on_a100.picoseconds == pytest.approx(37.5 / GPUS["A100"].instructions * 1e12)


def test_instructions_are_told_apart() -> None:
    body = [
        "@!P0 FMNMX R1, R2, R3, !PT", "FSETP.GT.AND P0, PT, R1, R2, PT", "LOP3.LUT R1, R2, 0xffff0000, RZ, 0xc0, !PT",
        "PRMT R1, R2, 0x5410, R3", "@P1 ISETP.GE.AND P0, PT, R1, R2, PT", "FFMA R1, R2, R3, R4", "@UP0 IMAD.U32 R1, R2",
        "MUFU.EX2 R1, R2", "LDG.E.128 R4, [R2.64]", "BRA `(.L_1)",
    ]  # fmt: skip
    loop = machine.loop_of(body)
    assert (loop.instructions, loop.half_rate, loop.arithmetic, loop.exponentials) == (10, 5, 2, 1)
    assert not loop.copied
    assert machine.loop_of(["LDGSTS.E.BYPASS.128 [R1], [R2.64]"]).copied


@pytest.mark.skipif(bool(backends.available()["cuda"]), reason="needs nvcc when cudfast is installed")
def test_projected_cuda_kernels_are_in_the_table() -> None:
    from cudfast.backends.cuda import compiled

    if "sm_90" not in compiled.targets():
        pytest.skip("CUDFAST_CUDA_ARCHS left it out")
    found = {e.kernel: e for e in gpu_model._cuda("bf16", 128_256, "H100") if "projected" in e.kernel}
    assert {name: (e.bytes_per_element, e.exponentials_per_element) for name, e in found.items()} == {
        "CUDA projected, staged by 4 blocks": (6, 7), "CUDA projected, two sweeps": (10, 7)
    }  # fmt: skip
