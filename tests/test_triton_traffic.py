"""Each Triton kernel reads its inputs once and writes its outputs once; and the count of it can be trusted."""

import pytest
import torch

from triton_interpreter import INTERPRETED

if not INTERPRETED:
    pytest.skip("Triton's interpreter counts; it needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

import head_traffic
import rlkernels
import traffic
from cases import thorough

QUICK = (traffic.token_logprobs_part, traffic.kl_penalty, traffic.value_loss, traffic.masked)


@pytest.mark.parametrize("case", [case if case in QUICK else thorough(case) for case in traffic.CASES])
def test_no_kernel_moves_more_than_it_must(case):
    torch.manual_seed(0)
    with rlkernels.use_backend("triton"):
        for line in case():
            assert line.traffic.kernels, line.name
            assert line.ratio > 0.9, f"{line.name}: {line.ratio:.3f} of the least possible is not all"
            if line.ours:
                assert line.ratio <= traffic.MOST, f"{line.name}: {line.ratio:.3f} times the least possible"


@triton.jit
def _copy_kernel(source, scale, destination, count, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(TIMES):
        value = tl.load(source + index, mask=index < count)
    tl.store(destination + index, value * tl.load(scale), mask=index < count)


def copy(source: torch.Tensor, times: int, scale: torch.Tensor) -> torch.Tensor:
    destination = torch.empty_like(source)
    _copy_kernel[(triton.cdiv(len(source), 256),)](source, scale, destination, len(source), TIMES=times, BLOCK=256)
    return destination


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_lanes_that_the_mask_holds_back_are_not_counted(dtype):
    source, scale = torch.ones(1000, dtype=dtype), torch.ones(1, dtype=dtype)
    line = traffic.measured("copy", copy, source, 1, scale)
    size = 1000 * dtype.itemsize
    # Every program reads the scale, but from the cache that they share.
    assert (line.traffic.read, line.traffic.written, line.ratio) == (size + dtype.itemsize, size, 1.0)
    assert list(line.traffic.kernels) == ["_copy_kernel"]


@triton.jit
def _spread_kernel(source, destination, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(destination + index, tl.load(source + index // 16))


def test_a_small_tensor_that_an_earlier_launch_left_is_read_once():
    def twice(source: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        return copy(source, 1, copy(one, 1, one))

    source, one = torch.ones(1000), torch.ones(1)
    line = traffic.measured("twice", twice, source, one)
    # Four programs of the second launch read the scale that the first one left.
    assert (line.traffic.read, line.traffic.written) == (4 + 4000 + 4, 4 + 4000)


def test_lanes_at_one_address_read_it_once():
    source, destination = torch.ones(64), torch.empty(1024)
    with traffic.counting() as counted:
        _spread_kernel[(1,)](source, destination, BLOCK=1024)
    assert (counted.read, counted.written) == (256, 4096)


def test_reading_twice_is_seen(monkeypatch, capsys):
    def case():
        yield traffic.measured("copy", copy, torch.ones(1000), 2, torch.ones(1))

    monkeypatch.setattr(traffic, "CASES", [case])
    monkeypatch.setattr(head_traffic, "SHAPES", [((256, 32, 640), torch.float32, (128, 128))])
    assert traffic.main() == 1
    captured = capsys.readouterr()
    assert "1.500" in captured.out and "error: " in captured.err
    assert "| linear_policy_loss | [256, 32, 640] float32 | 3.00 | 0.0 |" in captured.out


def test_counting_ends():
    load = traffic.interpreter.InterpreterBuilder.create_masked_load
    with pytest.raises(ZeroDivisionError), traffic.counting() as counted:
        copy(torch.ones(8), 1, torch.ones(1))
        raise ZeroDivisionError
    assert counted.total == 68 and traffic.interpreter.InterpreterBuilder.create_masked_load is load
