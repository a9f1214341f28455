"""What scripts/assemble_kernels.py reads from the assembler's output."""

from scripts.assemble_kernels import report

PTXAS = """ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are \
serialized due to non wgmma instructions defining input registers of a wgmma in the function 'k'
ptxas info    : Function properties for k
    152 bytes stack frame, 156 bytes spill stores, 228 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers"""
KERNEL = """
   -:-:-:Y:01  /*0010*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0
   -:-:-:Y:01  /*0020*/  HGMMA.64x128x16.F32.BF16 R88, R156, gdesc[UR8].tnspB, R88, gsb0
   -:-:-:Y:02  /*0030*/  WARPGROUP.DEPBAR.LE gsb0, 0x1
   -:-:-:Y:02  /*0040*/  @!P2 {}
   -:-:-:Y:02  /*0050*/  WARPGROUP.DEPBAR.LE gsb0, 0x0
   -:-:-:Y:01  /*0060*/  F2FP.BF16.F32.PACK_AB R156, R25, R24
"""


def test_figures_and_what_the_assembler_gave_up() -> None:
    said = report(PTXAS, KERNEL.format("FADD R3, R24, R25"))
    assert said[:3] == (168, 156, 6)
    assert said.faults == [
        "wgmma.mma_async instructions are serialized due to non wgmma instructions defining input "
        "registers of a wgmma in the function "
    ]


def test_registers_of_a_product_under_way() -> None:
    """Of the second one until the wait for all, of the first one until that for all but one."""
    for harmless in (
        "FADD R155, R24, R87",
        "FADD R160, R24, R25",
        "FADD R3, R156, R25",
        "STS.128 [R156], R24",
    ):
        assert report("", KERNEL.format(harmless)).faults == []
    for touch in (
        "FADD R158, R24, R25",
        "LDS.128 R156, [R3]",
        "IMAD.WIDE R158, R2, R3, R4",
        "FMUL R3, R4, R151",
        "MOV R88, RZ",
    ):
        (fault, *_) = report("", KERNEL.format(touch)).faults
        assert fault == f"0040 {touch} touches what 0020 has under way"
    early = KERNEL.replace("gsb0, 0x1", "gsb0, 0x2").format("FMNMX R3, R24, R87, !PT")
    assert report("", early).faults[0].endswith("touches what 0010 has under way")


def test_a_branch_that_lies_behind_the_wait() -> None:
    """Assemblers put what is seldom executed last, where it comes before the wait all the same."""
    moved = (
        KERNEL.format("BRA `(.L_x_1)")
        + """
   -:-:-:Y:01  /*0070*/  EXIT
.L_x_1:
   -:-:-:Y:01  /*0080*/  FADD R88, R24, R25
   -:-:-:Y:01  /*0090*/  BRA `(.L_x_2)
"""
    )
    back = moved.replace("   -:-:-:Y:02  /*0050*/", ".L_x_2:\n   -:-:-:Y:02  /*0050*/")
    assert report("", back).faults == ["0080 FADD R88, R24, R25 touches what 0020 has under way"]
    assert report("", back.replace("FADD R88", "FADD R3")).faults == []
