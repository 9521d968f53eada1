"""Checks on the GPU what the kernels take for granted of PyTorch: its stream, and float32 sums of 16-bit products."""

import torch

import rlkernels


def check_stream() -> None:
    """A CUDA kernel runs on the current stream: it must see what was queued there before it, however late."""
    reasons = rlkernels._backends.status("cuda", "cuda")
    if reasons:
        print(f"stream: not checked: {reasons}")
        return
    x = torch.randn(64, 4096, device="cuda")
    ref = torch.randn_like(x)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream), rlkernels.use_backend("cuda"):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        got = rlkernels.kl_penalty(late, ref)
    stream.synchronize()
    with rlkernels.use_backend("reference"):
        torch.testing.assert_close(got, rlkernels.kl_penalty(x, ref))
    print("stream: the CUDA kernels wait for the current stream's work")


def check_accumulation() -> None:
    """addmm adds to its own output, which is float32 where the factors are bfloat16."""
    a, b = (torch.randn(256, 256, device="cuda").bfloat16() for _ in range(2))
    out = torch.randn(256, 256, device="cuda")
    want = out.double() + a.double() @ b.double()
    address = out.data_ptr()
    torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    assert out.data_ptr() == address
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-3)
    print("addmm: a float32 output may be its own addend")


if __name__ == "__main__":
    check_stream()
    check_accumulation()
