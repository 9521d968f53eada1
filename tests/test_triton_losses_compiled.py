"""What the Triton kernels of policy_loss and value_loss are compiled to: instructions per token, barriers, widths of
loads. Each thread takes four tokens a turn of its loop."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from triton_interpreter import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels do not compile in a process with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from cases import thorough
from gpu_assembly import (
    TARGETS,
    Counts,
    compile_for,
    count,
    disassemble,
    innermost_loop_with_loads,
    instructions,
    variants_for,
)
from launches import Seen
from rlkernels.triton import _token_losses
from test_triton_compiled import empty, policy, value

TOKENS = 4


class Bar(NamedTuple):
    launch: Callable[[], None]
    kernel: str
    instructions: float
    """At most this many per token, in the loop."""
    wide_loads: int
    """Inputs that hold one number per token; each is read 16 bytes at a time."""


BARS = {
    "ppo": Bar(policy, "policy_loss._token_kernel", 132, 2),
    "ppo on-policy, unmasked": Bar(lambda: policy(old=False, masked=False), "policy_loss._token_kernel", 100, 1),
    "ppo, reference, entropy, lengths": Bar(
        lambda: policy(ref=True, per_token=True, entropy=True, aggregation="seq_mean_token_mean"),
        "policy_loss._token_kernel",
        140,
        5,
    ),
    "gspo": Bar(lambda: policy(objective="gspo", sampler="sequence_mask"), "policy_loss._token_kernel", 132, 2),
    "gmpo": Bar(lambda: policy(objective="gmpo"), "policy_loss._token_kernel", 132, 2),
    "sapo": Bar(lambda: policy(objective="sapo"), "policy_loss._token_kernel", 132, 2),
    "dppo_tv": Bar(lambda: policy(objective="dppo_tv"), "policy_loss._token_kernel", 132, 2),
    "value_loss": Bar(value, "value_loss._token_kernel", 60, 3),
    "value_loss unclipped, unmasked": Bar(lambda: value(old=False, masked=False), "value_loss._token_kernel", 60, 2),
}


@pytest.fixture
def assembled(monkeypatch, tmp_path):
    """assembled(target, launch): the text of each kernel that `launch` compiles, by its name."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def assemble(target, launch):
        return {name: disassemble(kernels[0]).text for name, kernels in compile_for(TARGETS[target], launch).items()}

    return assemble


@pytest.mark.parametrize("target", ["sm_90", thorough("sm_100"), thorough("sm_80")])
@pytest.mark.parametrize(
    "name", ["ppo", "value_loss", *(thorough(name) for name in BARS if "_" not in name and name != "ppo")]
)
def test_a_loop_over_tokens(name, target, assembled):
    bar = BARS[name]
    loop = count(instructions(innermost_loop_with_loads(assembled(target, bar.launch)[bar.kernel])))
    assert loop.instructions <= bar.instructions * TOKENS
    assert (loop.barriers, loop.shuffles) == (0, 0)
    assert loop.loads[16] == bar.wide_loads
    assert set(loop.stores) == {16}


@pytest.mark.parametrize("target", ["sm_90", thorough("sm_100"), thorough("sm_80")])
@pytest.mark.parametrize(
    ("launch", "module", "rows", "words"), [(policy, "policy_loss", 10, 1), (value, "value_loss", 8, 2)]
)
def test_the_finish_is_one_sweep_over_at_most_1024_partial_sums(launch, module, rows, words, target, assembled):
    finish = assembled(target, launch)[f"{module}._finish_kernel"]
    with pytest.raises(ValueError):  # no loop
        innermost_loop_with_loads(finish)
    loads = count(instructions(finish)).loads
    threads = 32 * _token_losses.FINISH_WARPS
    assert sum(width * number for width, number in loads.items()) * threads == rows * 1024 * 4 * words


def test_there_are_at_most_1024_programs():
    assert [_token_losses.programs_for(tokens, 1) for tokens in (0, 1, 1024, 1025, 2**20, 2**20 + 1, 2**33)] == [
        *(0, 1, 1, 2, 1024, 1024, 1024)
    ]


@pytest.mark.parametrize("target", ["sm_90", thorough("sm_100"), thorough("sm_80")])
@pytest.mark.parametrize("dtype", [0, thorough(1)])
def test_both_gradients_are_scaled_16_bytes_at_a_time(dtype, target, assembled):
    def launch():
        grad = empty(16, 4096)
        _token_losses.token_loss_backward(grad, grad, empty(), empty(), dtype, 0)

    (text,) = assembled(target, launch).values()
    found: Counts = count(instructions(text))
    assert found.loads == {16: 2, 4: 2}  # and the two factors
    assert found.stores == ({16: 2} if dtype == 0 else {16: 1, 8: 1})
    assert (found.barriers, found.shuffles) == (0, 0)


@pytest.mark.parametrize("target", ["sm_90", thorough("sm_100"), thorough("sm_80")])
def test_sums_over_sequences_read_16_bytes_at_a_time(target, assembled):
    kernels = assembled(target, lambda: policy(objective="gspo", sampler="sequence_mask"))
    loop = count(instructions(innermost_loop_with_loads(kernels["policy_loss._sequences_kernel"])))
    assert loop.loads == {16: 6, 8: 1}  # eight tokens a thread: three numbers each, and the mask
    assert (loop.barriers, loop.shuffles) == (0, 0)
    assert loop.instructions <= 35 * 8
    kernels = assembled(target, lambda: value(aggregation="seq_mean_token_sum"))
    loop = count(instructions(innermost_loop_with_loads(kernels["_token_losses._lengths_kernel"])))
    assert loop.loads == {16: 1}
    assert (loop.barriers, loop.shuffles) == (0, 0)
    assert loop.instructions <= 12 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, thorough(torch.float64)])
def test_other_dtypes_are_widened_when_they_are_loaded(dtype, assembled):
    def launch():
        value_loss = pytest.importorskip("rlkernels.triton.value_loss")
        inputs = [empty(16, 4096, dtype=dtype) for _ in range(3)]
        value_loss.value_loss_forward(*inputs, empty(16, 4096, dtype=torch.int64), None, None, 0.0, 0, 0.2, True)

    text = assembled("sm_90", launch)["value_loss._token_kernel"]
    loop = count(instructions(innermost_loop_with_loads(text)))
    assert loop.loads == ({8: 3, 16: 2} if dtype == torch.bfloat16 else {16: 8})
    assert (loop.barriers, loop.shuffles) == (0, 0)


@pytest.mark.parametrize(
    ("launch", "kernels"),
    [
        (lambda: policy(normalizer=0), {"_token_kernel", "_finish_kernel", "_scale_kernel"}),
        (
            lambda: policy(packed=True, aggregation="seq_mean_token_mean", sampler="token_mask", entropy=True),
            {"_valid_kernel", "_lengths_kernel", "_token_kernel", "_finish_kernel", "_scale_kernel"},
        ),
        (
            lambda: policy(objective="gmpo", ref=True),
            {"_sequences_kernel", "_token_kernel", "_finish_kernel", "_scale_kernel"},
        ),
        (
            lambda: value(packed=True, aggregation="seq_mean_token_mean"),
            {"_valid_kernel", "_lengths_kernel", "_token_kernel", "_finish_kernel"},
        ),
    ],
)
def test_a_launcher_launches_its_kernels_and_nothing_else(launch, kernels):
    with Seen() as seen:
        launched = variants_for(TARGETS["sm_90"], launch)
    assert (seen.own, seen.launched) == ([], [])
    assert {name.partition(".")[2] for name in launched} == kernels
