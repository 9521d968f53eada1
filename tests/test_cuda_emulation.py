"""The emulation that runs the CUDA kernels on the host: it does what a GPU does, and finds what a GPU would hide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import build

SCHEDULES = ("forward", "backward", "random:1", "random:2")


@pytest.fixture(scope="module")
def run():
    program = build.program(build.HERE / "self_test.cpp")

    def run(case, schedule="forward", **options):
        environment = {**os.environ, "CUDA_EMULATION_SCHEDULE": schedule, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([program, case], env=environment, capture_output=True, timeout=300, **options)

    return run


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "case",
    [
        "indices",
        "block_barrier",
        "warp_barrier",
        "shuffles",
        "votes",
        "partial_warp",
        "atomics",
        "vector_loads",
        "unwritten_shared",
        "after_an_error",
    ],
)
def test_works(run, case, schedule):
    result = run(case, schedule, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("schedules", [SCHEDULES, [f"random:{seed}" for seed in range(8)]], ids=["all", "random"])
@pytest.mark.parametrize("case", ["missing_barrier", "missing_second_barrier", "missing_warp_barrier"])
def test_a_missing_barrier_changes_the_answer(run, case, schedules):
    results = [run(case, schedule) for schedule in schedules]
    assert all(result.returncode == 0 for result in results)
    assert len({result.stdout for result in results}) > 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("out_of_bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("dynamic_out_of_bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("shared_out_of_bounds", "index 32 out of bounds for type 'float [32]'"),
        ("misaligned_vector", "misaligned address"),
        ("divergent_barrier", "thread 5 of block 0,0,0 has exited"),
        ("two_barriers", "divergent barriers"),
        ("divergent_shuffle", "thread 16 of block 0,0,0 has exited"),
        ("absent_lane", "a shuffle reads a lane that does not take part in it"),
        ("too_many_threads", "invalid configuration argument"),
        ("empty_grid", "invalid configuration argument"),
    ],
)
def test_finds(run, case, report, schedule):
    result = run(case, schedule, text=True)
    assert result.returncode != 0
    assert report in result.stdout + result.stderr


def test_an_unknown_schedule_is_refused(run):
    result = run("indices", "sideways", text=True)
    assert result.returncode != 0
    assert "CUDA_EMULATION_SCHEDULE must be forward, backward, random or random:SEED; got sideways" in result.stderr


def test_conversions_equal_those_of_torch(run):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int()
    every_half = torch.arange(65536).to(torch.uint16)
    # What lies half-way between two neighbours, for the ties, and a bit to both sides.
    half_way = {
        dtype: every_half.view(dtype).float().view(torch.int32)[:, None] + torch.tensor([-1, 0, 1]) + ulp // 2
        for dtype, ulp in ((torch.bfloat16, 1 << 16), (torch.float16, 1 << 13))
    }
    values = torch.cat([bits, *(ties.flatten() for ties in half_way.values())]).int().view(torch.float32)
    result = run("conversions", input=values.numpy().tobytes())
    assert result.returncode == 0, result.stderr

    size = 65536 * 2 * 4
    widened = torch.frombuffer(bytearray(result.stdout[:size]), dtype=torch.float32).view(-1, 2)
    rounded = torch.frombuffer(bytearray(result.stdout[size:]), dtype=torch.uint16).view(-1, 2)
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        torch.testing.assert_close(
            widened[:, column], every_half.view(dtype).float(), rtol=0.0, atol=0.0, equal_nan=True
        )
        got, wanted = rounded[:, column].contiguous().view(dtype), values.to(dtype)
        known = ~wanted.isnan()
        assert torch.equal(got.isnan(), ~known)
        assert torch.equal(got[known].view(torch.int16), wanted[known].view(torch.int16))
