"""The gate on CUDA machine code: what it must refuse, on texts as ptxas and the disassembler write them."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("check_cuda", Path(__file__).parent.parent / "tools" / "check_cuda.py")
check_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_cuda)

NOTES = """ptxas info    : Compiling entry function 'sm90_moe' for 'sm_90a'
ptxas info    : Function properties for sm90_moe
    {stack} bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 16 bytes smem
"""
GOOD = ["USETMAXREG.DEALLOC.CTAPOOL 0x28", "UTMALDG.2D [UR8], [UR4]", "WARPGROUP.ARRIVE"] + ["HGMMA.64x256x16.F32.BF16"] * 4


def problems_of(opcodes, spills=0, stack=0):
    kernels = check_cuda.read_ptxas(NOTES.format(spills=spills, stack=stack))
    lines = [f"        /*{16 * place:04x}*/                   {opcode} ;" for place, opcode in enumerate(opcodes)]
    check_cuda.read_sass("\n".join(["\tcode for sm_90a", "\t\tFunction : sm90_moe", *lines]), kernels)
    kernel = kernels["sm90_moe", "sm_90a"]
    assert kernel.registers == 168
    return kernel.problems()


def test_a_pipelined_kernel_passes():
    assert problems_of(GOOD) == []
    assert problems_of([*GOOD, "CALL.REL.NOINC 0x40"]) == []  # after the products


def test_amperes_kernel_uses_its_units():
    name, ampere = "_ZN8flashmoe10moe_kernelINS_10Sm80EngineE", ["LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "HMMA.16816.F32.BF16"]
    for missing in range(4):
        kernel = check_cuda.Kernel(name, "sm_80", sass=ampere[:missing] + ampere[missing + 1 :])
        assert kernel.problems() == [f"no {opcode}" for opcode in [["LDGSTS"], ["LDSM"], ["HMMA"], []][missing]]


@pytest.mark.parametrize(
    ("opcodes", "spills", "problem"),
    [
        (GOOD, 8, "8 bytes spilled"),
        (GOOD[1:], 0, "no USETMAXREG"),
        (GOOD[:1] + GOOD[2:], 0, "no UTMALDG"),
        (GOOD[:3], 0, "no HGMMA"),
        ([*GOOD, "CALL.REL.NOINC 0x40", GOOD[-1]], 0, "a CALL among the products"),
        (GOOD[:2] + ["WARPGROUP.ARRIVE", GOOD[-1]] * 4, 0, "4 groups for 4 products: serialised"),
    ],
)
def test_a_kernel_that_lost_its_speed_is_refused(opcodes, spills, problem):
    assert problems_of(opcodes, spills) == [problem]


def test_an_array_that_left_the_registers_is_refused():
    assert problems_of(GOOD, stack=16) == ["16 bytes of stack"]  # without spills: it was indexed
    assert problems_of(GOOD, spills=8, stack=8) == ["8 bytes spilled", "8 bytes of stack"]


def test_loads_that_do_not_see_what_others_write_are_refused():
    loads = ["LDG.E.128.CONSTANT R4, [R2.64]", "LDG.E R4, [R2.64]"]
    for name, problems in {
        "_ZN8flashmoe10moe_kernelINS_11ExactEngineENS_12CudaPlatformEE": ["1 loads through the read-only cache"],
        "_ZN8flashmoe10moe_kernelINS_11ExactEngineENS_15NvshmemPlatformEE": [],
        "_ZN8flashmoe12begin_kernelE": [],
    }.items():
        assert check_cuda.Kernel(name, "sm_80", sass=loads).problems() == problems


def test_what_a_called_function_keeps_on_the_stack_is_its_kernels():
    called = """ptxas info    : Function properties for put_signal
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
    kernels = check_cuda.read_ptxas(NOTES.format(spills=0, stack=0) + called)
    assert (kernels["sm90_moe", "sm_90a"].stack, kernels["sm90_moe", "sm_90a"].spills) == (8, 8)


def test_each_architecture_has_code_of_its_own():
    kernels = check_cuda.read_ptxas(NOTES.format(spills=0, stack=0) + NOTES.format(spills=4, stack=0).replace("sm_90a", "sm_80"))
    code = "        /*0000*/                   EXIT ;"
    check_cuda.read_sass("\n".join(["\tcode for sm_80", "\t\tFunction : sm90_moe", code]), kernels)
    assert {arch: (k.spills, len(k.sass)) for (_, arch), k in kernels.items()} == {"sm_90a": (0, 0), "sm_80": (4, 1)}
    assert "no machine code" in kernels["sm90_moe", "sm_90a"].problems()
