"""benchmarks/assembly.py finds loops, their instructions and spills in code written by hand."""

from benchmarks import assembly
from benchmarks.assembly import Loop

# A loop around two others, as in the kernel of dk and dv. The middle of the second was moved behind the end, and a call
# leaves it. The last loop, of one instruction, cannot be reached.
SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
.L_x_0:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R8, RZ ;
        /*0060*/                   BRA.U UP0, `(.L_x_1) ;
        /*0070*/              @!P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0080*/                   HMMA.16816.F32 R4, R4, R8, RZ ;
        /*0090*/               @P1 BRA `(.L_x_5) ;
.L_x_3:
        /*00a0*/              @!P0 CALL.REL.NOINC `(.L_x_4) ;
        /*00b0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00c0*/                   ISETP.GE.AND P2, PT, R2, c[0x0][0x170], PT ;
        /*00d0*/               @P2 BRA `(.L_x_0) ;
        /*00e0*/                   STL.64 [R1], R2 ;
        /*00f0*/              @!P3 STL [R1+0x8], R2 ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   FADD R2, R2, R2 ;
        /*0120*/                   FADD R2, R2, R2 ;
        /*0130*/                   BRA `(.L_x_3) ;
.L_x_6:
        /*0140*/                   BRA `(.L_x_6);
"""

AMD = """
kernel:                                 ; @kernel
	.cfi_startproc
; %bb.0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], 0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 10 5                          ; kernel.py:10:5
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	v_add_f32_e32 v0, v0, v1
	s_cmp_lg_u32 s4, 0
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	v_add_f32_e32 v0, v0, v1
	s_cbranch_scc0 .LBB0_2
.LBB0_3:
	s_endpgm
.Lfunc_end0:
	.size	kernel, .Lfunc_end0-kernel
"""


def test_the_inner_loops_of_sass():
    code = assembly.sass(SASS)
    assert len(code) == 21
    # Code outside the inner loops does not count.
    assert assembly.inner_loops(code, "HMMA") == [Loop(2, 2), Loop(1, 6)]
    assert assembly.inner_loops(code, "HGMMA") == []
    # If no inner loop holds the instruction, the loop around them is the innermost.
    assert assembly.inner_loops(code, "ISETP") == [Loop(1, 14)]


def test_the_inner_loops_of_amdgcn():
    code = assembly.amdgcn(AMD)
    assert [i.name for i in code[:3]] == ["s_load_dwordx2", "v_mfma_f32_32x32x8_bf16_1k", "s_cbranch_scc1"]
    assert len(code) == 11
    assert assembly.inner_loops(code, "v_mfma") == [Loop(1, 3)]
    # An unreachable loop does not count.
    assert assembly.inner_loops(assembly.amdgcn(AMD.replace("v_mfma", "v_other")), "v_add") == [Loop(1, 3)]


def test_code_without_a_loop():
    straight = "\n".join(line for line in SASS.splitlines() if "BRA" not in line and "CALL" not in line)
    assert assembly.inner_loops(assembly.sass(straight), "HMMA") == []


def test_bytes_spilled():
    assert assembly.bytes_spilled(SASS) == 12
    assert assembly.bytes_spilled(SASS.replace("STL", "STS")) == 0
