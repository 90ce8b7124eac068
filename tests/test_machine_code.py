"""What CUDA's tools print is read: no tool, compiler or GPU is needed."""

import pytest

from kivi_tvm.control_flow import innermost_loops
from kivi_tvm.instruction_counts import access_bits, count, kind_of
from kivi_tvm.machine_code import kernels, parse_sass, parse_threads
from kivi_tvm.occupancy import group_bytes, occupancy


def sass(*lines):
    """What `cuobjdump -sass` prints of instructions at 0, 0x10, 0x20 ..."""
    body = "".join(
        f"        /*{16 * at:04x}*/  {line} ;      /* 0x00000a00ff017b82 */\n"
        "                                         /* 0x000ff00000000800 */\n"
        for at, line in enumerate(lines)
    )
    return f"\n\tcode for sm_90\n\t.target\tsm_90\n\n\t\tFunction : attend_kernel\n{body}"


NESTED = (
    "LDC R1, c[0x0][0x28]",  # 0x00
    "LDG.E.CONSTANT R4, desc[UR8][R6.64]",  # 0x10: outer loop
    "LDG.E.128 R40, desc[UR8][R24.64+0x100]",  # 0x20: inner loop
    "@P5 BRA 0xd0",  # 0x30: a rare path of the inner loop, at the end
    "LOP3.LUT R3, R36, 0xfffffffc, R157, 0xf8, !PT",  # 0x40
    "HMMA.16816.F32 R4, R8, R12, R4",  # 0x50
    "@!P1 BRA 0x20",  # 0x60
    "STL.64 [R1], R2",  # 0x70
    "@P0 BRA 0x10",  # 0x80
    "@P2 EXIT",  # 0x90
    "LDL R2, [R1]",  # 0xa0
    "@!P3 BRA 0x100",  # 0xb0: a rare path outside of loops, at the end
    "EXIT",  # 0xc0
    "I2F.RP R0, R3",  # 0xd0
    "HADD2.F32 R17, -RZ, R36.H0_H0",  # 0xe0
    "BRA 0x40",  # 0xf0
    "F2FP.F16.F32.PACK_AB R0, RZ, R0",  # 0x100
    "BRA 0xc0",  # 0x110
    "BRA 0x120",  # 0x120
    "NOP",  # 0x130
)
USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function attend_kernel:
  REG:166 STACK:8 SHARED:11584 LOCAL:16 CONSTANT[0]:660 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = """
.nv.info.append_kernel
\t<0x1>
\tAttribute:\tEIATTR_MAXREG_COUNT
\tFormat:\tEIFMT_HVAL
\tValue:\t0xff
.nv.info.attend_kernel
\t<0x11>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x20 0x4 0x1
.nv.callgraph
"""


def test_instructions():
    [first, *_, last] = parse_sass(sass(*NESTED))["attend_kernel"]
    assert (first.address, first.name, first.target) == (0, "LDC", None)
    assert (last.address, last.name) == (0x130, "NOP")


@pytest.mark.parametrize(
    ("line", "target", "falls_through"),
    [
        ("BRA 0x10", 0x10, False),
        ("@!P1 BRA 0x10", 0x10, True),
        ("@!UP1 BRA 0x10", 0x10, True),
        ("BRA !P0, 0x10", 0x10, True),
        ("BRA.U UP0, 0x10", 0x10, True),
        ("BRA.DIV ~URZ, 0x10", 0x10, True),
        ("WARPSYNC.COLLECTIVE R4, 0x10", 0x10, True),
        ("CALL.REL.NOINC 0x10", None, True),
        ("BSSY B0, 0x10", None, True),
        ("RET.REL.NODEC R4 0x0", None, False),
        ("EXIT", None, False),
        ("@P0 EXIT", None, True),
        ("LOP3.LUT R3, R3, 0x10", None, True),
    ],
)
def test_jumps(line, target, falls_through):
    [found] = parse_sass(sass(line))["attend_kernel"]
    assert (found.target, found.falls_through) == (target, falls_through)


def test_the_inner_loop_has_its_rare_path_and_others_are_no_loops():
    [loop] = innermost_loops(parse_sass(sass(*NESTED))["attend_kernel"])
    assert [each.address for each in loop] == [0x20, 0x30, 0x40, 0x50, 0x60, 0xD0, 0xE0, 0xF0]


def test_loops_one_after_the_other():
    text = sass("MOV R0, R1", "FADD R0, R0, R1", "@P0 BRA 0x10", "@P1 BRA 0x30", "EXIT")
    found = innermost_loops(parse_sass(text)["attend_kernel"])
    assert [[each.address for each in loop] for loop in found] == [[0x10, 0x20], [0x30]]


def test_no_loop():
    assert innermost_loops(parse_sass(sass("MOV R0, R1", "EXIT"))["attend_kernel"]) == []


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.CONSTANT", 32),
        ("LDG.E.U16.CONSTANT", 16),
        ("LDG.E.S8", 8),
        ("LDG.E.64", 64),
        ("LDG.E.128.CONSTANT", 128),
        ("LDG.E.ENL2.256", 256),
        ("LDGSTS.E.BYPASS.LTC128B.128", 128),
    ],
)
def test_bits_of_an_access(name, bits):
    assert access_bits(name) == bits


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HMMA.16816.F32", "mma"),
        ("IMMA.16832.U8.S8", "mma"),
        ("LDSM.16.M88.4", "shared_loads"),
        ("I2FP.F32.S32", "int_to_float"),
        ("F2I.FTZ.U32.TRUNC.NTZ", "float_to_int"),
        ("F2FP.F16.F32.PACK_AB", "float_to_float"),
        ("HADD2.F32", "float_to_float"),
        ("HADD2", "other"),
        ("SHF.R.U32.HI", "logic"),
        ("LOP3.LUT", "logic"),
        ("PLOP3.LUT", "other"),
        ("PRMT", "integer"),
        ("IMAD.WIDE", "integer"),
        ("IMAD.MOV.U32", "other"),
        ("FFMA", "other"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_counts():
    instructions = parse_sass(sass(*NESTED, "LDG.E.U16 R0, [R2]"))["attend_kernel"]
    counts = count(instructions)
    assert counts.total == 20  # without the filler
    assert (counts.global_load_bytes, counts.wide_load_bytes) == (16 + 4 + 2, 16)
    assert counts.to_dict()["global_loads"] == {"32": 2, "64": 0, "128": 1}
    assert counts.to_dict()["total"] == 20


def test_a_kernel():
    [kernel] = kernels(sass(*NESTED), USAGE, ELF)
    assert (kernel.name, kernel.architecture, kernel.registers) == ("attend", "sm_90", 166)
    # 1 kB of what the tool says is the system's
    assert (kernel.shared_bytes, kernel.local_bytes, kernel.spilled_bytes) == (10560, 24, 12)
    assert kernel.threads == 128
    assert kernel.main_loop.address == 0x20
    assert kernel.main_loop.counts["mma"] == kernel.main_loop.counts["int_to_float"] == 1


def test_older_tools_count_no_shared_memory_of_the_system():
    [kernel] = kernels(sass(*NESTED).replace("sm_90", "sm_80"), USAGE, ELF)
    assert kernel.shared_bytes == 11584


def test_threads_are_of_the_kernel_that_says_so():
    assert parse_threads(ELF) == {"attend_kernel": 128}


@pytest.mark.parametrize(
    ("kernel", "groups", "warps", "limit"),
    [
        # NVIDIA's occupancy calculator
        (("sm_80", 256, 32, 0), 8, 64, "warps"),
        (("sm_80", 256, 64, 0), 4, 32, "registers"),
        (("sm_80", 32, 16, 0), 32, 32, "work-groups"),
        (("sm_80", 128, 32, 48 << 10), 3, 12, "shared memory"),
        (("sm_86", 256, 32, 0), 6, 48, "warps"),
        (("sm_86", 32, 16, 0), 16, 16, "work-groups"),
        (("sm_89", 32, 16, 0), 24, 24, "work-groups"),
        (("sm_75", 256, 32, 0), 4, 32, "warps"),
        (("sm_75", 128, 32, 32 << 10), 2, 8, "shared memory"),
        (("sm_90a", 128, 168, 0), 3, 12, "registers"),
        (("sm_90", 128, 168, 72 << 10), 3, 12, "registers"),
        (("sm_90", 128, 168, 100 << 10), 2, 8, "shared memory"),
        (("sm_120", 1024, 64, 0), 1, 32, "warps"),
    ],
    ids=str,
)
def test_occupancy(kernel, groups, warps, limit):
    found = occupancy(*kernel)
    assert (found.groups, found.warps, found.limit) == (groups, warps, limit)


def test_unknown_occupancy():
    assert occupancy("sm_60", 128, 32, 0) is None
    assert occupancy("sm_90", 0, 32, 0) is None


@pytest.mark.parametrize(
    ("architecture", "kilobytes"),
    [("sm_80", 163), ("sm_86", 99), ("sm_87", 99), ("sm_90a", 227), ("sm_121", 99), ("sm_130", 0)],
)
def test_shared_memory_of_one_work_group(architecture, kilobytes):
    assert (group_bytes(architecture) or 0) == kilobytes << 10
    assert group_bytes("") is None
