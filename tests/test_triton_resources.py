"""The arithmetic and the reading of machine code behind benchmarks/resources.py."""

import pytest

from triton_interpreter import INTERPRETED

if INTERPRETED:
    pytest.skip("kernels do not compile in a process with TRITON_INTERPRET=1", allow_module_level=True)

import resources
from gpu_assembly import Counts, count, innermost_loop_with_loads, instructions


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_memory", "expected"),
    [
        ("sm_80", 256, 32, 0, 1.0),
        ("sm_80", 256, 33, 0, 0.75),  # allotted by eights: 40
        ("sm_80", 128, 255, 0, 0.125),
        ("sm_80", 32, 16, 0, 0.5),  # 32 blocks at most
        ("sm_80", 1024, 64, 0, 0.5),
        ("sm_80", 256, 32, 41 * 1024, 3 * 8 / 64),  # 42 KiB with what the system takes, of 164
        ("sm_90", 256, 32, 48 * 1024, 4 * 8 / 64),  # of 228
        ("gfx942", 256, 64, 0, 1.0),
        ("gfx942", 256, 65, 0, 0.875),
        ("gfx942", 256, 512, 0, 0.125),
        ("gfx942", 256, 32, 24 * 1024, 0.25),
    ],
)
def test_occupancy(architecture, threads, registers, shared_memory, expected):
    warps = threads // resources.TARGETS[architecture].warp_size
    limits = resources.LIMITS[architecture]
    assert resources.occupancy(limits, warps, registers, shared_memory) == expected


@pytest.mark.parametrize(
    ("load", "size"),
    [
        ("LDG.E R0, desc[UR4][R2.64]", 4),
        ("LDG.E.U8.CONSTANT R0,", 1),
        ("LDG.E.U16 R0,", 2),
        ("LDG.E.64 R0,", 8),
        ("LDG.E.EF.128 R0,", 16),
        ("global_load_ubyte v1,", 1),
        ("global_load_short_d16 v1,", 2),
        ("global_load_dword v1,", 4),
        ("buffer_load_dwordx4 v[0:3],", 16),
        ("STG.E.128 [R2.64], R4", 0),
    ],
)
def test_load_width(load, size):
    assert resources.widest_load(load) == size
    assert resources.widest_load(f"{load}\nLDG.E.U8 R1,") == max(size, 1)


def test_names():
    kernel = "void rlk::forward_kernel<float, (bool)1, (rlk::Scaling)0>(rlk::Rows<(bool)1>, float*)"
    assert resources.short_name(kernel) == "forward_kernel<float>"
    assert resources.short_name("rlk::sum_kernel(float const*, long)") == "sum_kernel"


def test_ceiling():
    """A hundred instructions for each element of 16 bytes."""
    gpu = resources.Gpu("sm_90", 100, 2e9, 1e12)
    assert resources.ceiling(gpu, 100, 16) == 100 * 4 * 32 * 2e9 / 100 * 16


@pytest.mark.parametrize(("reads", "writes", "expected"), [(8, 4, 3 / 4), (2, 0, 3 / 8), (2, 2, 3 / 8)])
def test_instructions_of_an_element(reads, writes, expected):
    """Results are counted where there are some: four floats, eight numbers of two bytes."""
    kernel = resources.HotLoop("", "", "", "", reads, writes)
    loop = ["LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "FADD R0, R1, R2"]
    assert resources.per_element(loop, kernel) == expected


def test_every_hot_loop_is_of_a_case():
    from test_triton_compiled import CASES

    assert {loop.case for loop in resources.HOT_LOOPS} <= CASES.keys()


def test_a_kernel_of_triton_is_read():
    kernels = list(resources.triton_kernels("sm_90", only="kl_penalty k3"))
    assert {kernel.name for kernel in kernels} == {"kl._forward_kernel", "kl._backward_kernel"}
    for kernel in kernels:
        assert 0 < kernel.registers <= 64 and kernel.stack == 0 and kernel.load_bytes == 16 and kernel.threads == 128
        assert 0 < kernel.occupancy <= 1


def test_instructions_are_counted():
    text = """
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U8 R0, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0040*/                   SHFL.BFLY PT, R1, R0, 0x10, 0x1f ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P0 STG.E.64 desc[UR4][R2.64], R4 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   NOP ;
"""
    counts = count(instructions(text))
    assert counts == Counts(7, barriers=1, shuffles=1, loads={16: 1, 1: 1, 4: 1}, stores={8: 1})
    assert count(instructions(innermost_loop_with_loads(text))).instructions == 6
