"""The fused head's own kernels, for 16-bit inputs: what they are compiled to, and, interpreted, their equality with
float64 over the options, tile by tile."""

import pytest
import torch

from cases import thorough
from rlkernels import _registry
from rlkernels.ops.lm_head import tiles
from rlkernels.reference import logprobs as reference
from tolerance import assert_as_accurate_as_torch
from triton_interpreter import INTERPRETED

pytest.importorskip("triton")

PADDING = tiles.PADDING
OPTIONS = {
    "plain": dict(softcap=0.0, bias=False, entropy=False),
    "entropy": dict(softcap=0.0, bias=False, entropy=True),
    "softcap, bias, entropy": dict(softcap=30.0, bias=True, entropy=True),
}


def problem(rows: int, tokens: int, width: int, dtype: torch.dtype, bias: bool):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    hidden, weight = normal(rows, width).to(dtype), (normal(tokens, width) * (3 / width**0.5)).to(dtype)
    token_ids = torch.randint(tokens, (rows,), generator=generator)
    for row, token_id in enumerate((0, tokens - 1, 63, 64, PADDING)[:rows]):
        token_ids[row] = token_id
    return hidden, weight, normal(tokens) if bias else None, token_ids


def op(name):
    return _registry.op(name, "triton")


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs kernels on a CPU")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [48, 41], ids=["whole words", "rows of no whole words"])
def test_sums_and_gradient_are_those_of_the_logits(dtype, options, width):
    options = OPTIONS[options]
    hidden, weight, bias, token_ids = problem(37, 300, width, dtype, options["bias"])
    temperature, softcap, entropy = 0.7, options["softcap"], options["entropy"]
    sums = op("linear_token_logprobs_sums")(hidden, weight, bias, token_ids, temperature, softcap, entropy)
    results = op("token_logprobs_finish")(sums[None], temperature)

    def logits(number):
        product = hidden.to(number) @ weight.to(number).t()
        return product if bias is None else product + bias.to(number)

    def finished(number):
        part = reference.token_logprobs_part(logits(number), token_ids, 0, temperature, softcap, PADDING, entropy)
        return reference.token_logprobs_finish(part[None], temperature)

    names = ("logprobs", "entropy", "row_stats") if entropy else ("logprobs",)
    for name, *three in zip(names, results, finished(torch.float64), finished(torch.float32), strict=False):
        scored = token_ids != PADDING
        assert_as_accurate_as_torch(*(value[..., scored] for value in three), what=name)

    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(hidden), generator=generator) for _ in range(2)]
    upstream[1] = upstream[1] if entropy else None
    first, end = 70, 290

    def gradient(number):
        stats = [value.to(number) for value in results]
        grads = [None if value is None else value.to(number) for value in upstream]
        tile = logits(number)[:, first:end].contiguous()
        output = torch.empty_like(tile)
        reference.token_logprobs_part_backward(
            *(*grads, tile, token_ids, first, *stats, temperature, softcap, PADDING, output)
        )
        return output

    got = op("linear_token_logprobs_gradient")(
        *(*upstream, hidden, weight, bias, token_ids, *results, first, end, temperature, softcap, PADDING)
    )
    assert got.shape == (len(hidden), end - first) and got.dtype == dtype
    assert not got[4].any()  # padding
    assert_as_accurate_as_torch(got, gradient(torch.float64), gradient(torch.float32).to(dtype), gradient=True)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs kernels on a CPU")
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_a_row_has_the_same_bits_among_any_number_of_rows(rows):
    hidden, weight, bias, token_ids = problem(1, 300, 48, torch.bfloat16, True)
    alone = op("linear_token_logprobs_sums")(hidden, weight, bias, token_ids, 0.7, 0.0, True)
    many = (hidden.expand(rows, -1).contiguous(), weight, bias, token_ids.expand(rows).contiguous())
    sums = op("linear_token_logprobs_sums")(*many, 0.7, 0.0, True)
    assert torch.equal(sums, alone.expand_as(sums))


if not INTERPRETED:
    from gpu_assembly import TARGETS, compile_for, count, disassemble, instructions, variants_for
    from test_triton_compiled import head


# What a product is made of: of whole tiles from memory, and by the tensor cores.
PRODUCTS = {"sm_90": ("UTMALDG", "HGMMA"), "sm_100": ("UTMALDG", "UTCHMMA"), "sm_80": ("LDGSTS", "HMMA")}
SHARED = {"sm_90": 227, "sm_100": 227, "sm_80": 163, "gfx942": 64}
"""KiB that a block may have."""


@pytest.mark.skipif(INTERPRETED, reason="kernels do not compile in a process with TRITON_INTERPRET=1")
@pytest.mark.parametrize("target", ["sm_90", "gfx942", thorough("sm_100"), thorough("sm_80")])
@pytest.mark.parametrize("options", OPTIONS)
def test_tensor_cores_multiply_tiles_and_nothing_spills(options, target, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(TARGETS[target], lambda: head(**OPTIONS[options]))
    for name in ("lm_head._forward_kernel", "lm_head._gradient_kernel"):
        (kernel,) = compiled[name]
        assembly = disassemble(kernel)
        assert assembly.bytes_of_stack == 0
        assert assembly.shared_memory <= SHARED[target] * 1024
        if target in PRODUCTS:
            counts = count(instructions(assembly.text))
            assert not counts.loads[2] and not counts.stores[2]
            for instruction in PRODUCTS[target]:
                assert instruction in assembly.text
        else:
            assert "v_mfma_f32" in assembly.text


@pytest.mark.skipif(INTERPRETED, reason="kernels do not compile in a process with TRITON_INTERPRET=1")
def test_one_variant_serves_every_number_of_rows_and_tokens():
    def several():
        for rows in (1, 16, 511, 8192):
            for tokens in (1000, 32_000, 151_936):
                head(rows, tokens, entropy=True)

    variants = variants_for(TARGETS["sm_90"], several)
    assert {name: len(keys) for name, keys in variants.items() if "lm_head" in name} == {
        "lm_head._forward_kernel": 1,
        "lm_head._gradient_kernel": 1,
    }


def test_a_batch_of_8192_tokens_takes_ten_ranges_of_a_large_vocabulary():
    """Each is a kernel and two products, or 30 launches for the backward pass."""
    assert len(tiles.slices(151_936, tiles.range_of(8192))) == 10
