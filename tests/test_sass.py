"""The hot loop of a kernel's machine code is found, and shown with what lives there."""

import re
from collections.abc import Callable, Iterator

import pytest

from flamingo_fast.profiling import sass
from flamingo_fast.profiling.sass import (
    DoesNotCompileError,
    NoSuchKernelError,
    choose,
    hot_loop,
    read_gcn,
    read_sass,
)
from flamingo_fast.testing.aot import Compiler, PlannedCompile, Rules

# As nvdisasm prints it: two loops inside one, and the end of the program.
SASS = """
.text.kernel:                                                    // |       |        |
        /*0000*/                   MOV R1, c[0x0][0x28] ;        // |    1  |        |
.L_x_0:                                                          // |    3  |        |
        /*0010*/              @!P0 IADD3 R0, R0, 0x1, RZ ;       // |    3  |   1    |
.L_x_1:                                                          // |    3  |        |
        /*0020*/                   HMMA.16816.F32.BF16 R4, R0 ;  // |   40  |   1    |
        /*0030*/               @P0 BRA `(.L_x_1) ;               // |   30  |   1    |
.L_x_2:                                                          // |    3  |        |
        /*0040*/                   LDG.E.128 R8, [R2] ;          // |   90  |   1    |
        /*0050*/                   FADD R8, R8, R9 ;             // |   60  |   1    |
        /*0060*/               @P1 BRA `(.L_x_2) ;               // |   30  |   1    |
        /*0070*/               @P2 BRA `(.L_x_0) ;               // |    3  |   1    |
        /*0080*/               @P3 BRA `(.L_x_3) ;               // |    3  |   1    |
        /*0090*/                   EXIT ;                        // |       |        |
.L_x_3:                                                          // |       |        |
        /*00a0*/                   BRA `(.L_x_3);                // |       |        |
"""
GCN = """
kernel:
.Lfunc_begin0:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
\t.loc\t1 10 5                          ; a.py:10:5
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_scc1 .LBB0_1
\ts_branch .LBB0_2
.LBB0_2:
\ts_endpgm
.amdhsa_kernel kernel
\tv_not_code
"""


def test_reads_instructions_and_live_registers() -> None:
    instructions = read_sass(SASS)
    assert len(instructions) == 11
    assert [each.live for each in instructions[:4]] == [1, 3, 40, 30]
    assert instructions[1].opcode == "IADD3"
    assert instructions[1].labels == (".L_x_0",)
    assert (instructions[3].opcode, instructions[3].target) == ("BRA", ".L_x_1")


def test_hot_loop_is_the_inner_one_with_matrix_instructions() -> None:
    """Not the one around it, nor the longer one without."""
    instructions = read_sass(SASS)
    assert hot_loop(instructions) == range(2, 4)
    without = read_sass(SASS.replace("HMMA.16816.F32.BF16", "FADD"))
    assert hot_loop(without) == range(4, 7)


def test_no_loop() -> None:
    """A branch to itself is what follows the end; one ahead is no loop."""
    straight = "\n".join(line for line in SASS.splitlines() if "L_x_3" in line or "EXIT" in line)
    assert hot_loop(read_sass(straight)) is None
    assert hot_loop(()) is None


def test_reads_amd_assembly() -> None:
    instructions = read_gcn(GCN)
    assert [each.opcode for each in instructions] == [
        "s_load_dwordx2",
        "v_mfma_f32_32x32x8_bf16",
        "s_cbranch_scc1",
        "s_branch",
        "s_endpgm",
    ]
    assert hot_loop(instructions) == range(1, 3)
    assert instructions[1].is_matrix
    assert instructions[1].live is None


def plans() -> list[PlannedCompile]:
    def plan(case: str, kernel: str) -> PlannedCompile:
        return PlannedCompile(case, "sm_90", kernel, 0, "", "", Rules())

    names = ("norm_fwd/fp32/64", "norm_fwd/bf16/64", "norm_fwd/bf16/128")
    return [plan(name, "_norm_fwd_kernel") for name in names] + [plan("x", "_other_kernel#2")]


@pytest.mark.parametrize("kernel", ["norm_fwd", "_norm_fwd_kernel"])
def test_chooses_a_kernel_by_either_name(kernel: str) -> None:
    cases = [plan.case for plan in choose(plans(), kernel, "sm_90")]
    assert cases == ["norm_fwd/bf16/64", "norm_fwd/bf16/128", "norm_fwd/fp32/64"]
    assert [plan.case for plan in choose(plans(), kernel, "sm_90", "128")] == ["norm_fwd/bf16/128"]


def test_names_what_there_is() -> None:
    with pytest.raises(NoSuchKernelError, match="no kernel 'norm'; kernels: norm_fwd, other"):
        choose(plans(), "norm", "sm_90")
    with pytest.raises(NoSuchKernelError, match="has 'fp8' in it; norm_fwd/fp32/64, "):
        choose(plans(), "norm_fwd", "sm_90", "fp8")
    with pytest.raises(NoSuchKernelError, match="expected an architecture of sm_80, .* 'sm_91'"):
        sass.check_arch("sm_91")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["one_medium_fwd", "sm_91"], "got 'sm_91'"),
        (["one_medium_fwd"], "requires 2 arguments"),
        (["one_medium_fwd", "sm_90", "--json", "x.json"], "sass: goes without --json"),
        (["one_medium_fwd", "sm_90", "--target", "sm_80"], "sass: goes without --target"),
    ],
)
def test_mistakes(options: list[str], message: str, command: Callable) -> None:
    code, _, err = command("kernels", "--sass", *options)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


@pytest.fixture(scope="module")
def planted() -> Iterator[Compiler]:
    with Compiler("planted_aot", workers=1) as compiler:
        yield compiler


def test_nvidia_loop(planted: Compiler) -> None:
    text = sass.show_hot_loop(planted, "matmul", "sm_90", "dot/128_kib")
    first, *lines = text.splitlines()
    assert first == "matmul of dot/128_kib on sm_90: the hot loop"
    shown = [line for line in lines if re.match(r" +\d+   \S", line)]
    assert any("GMMA" in line for line in shown)
    assert "BRA" in shown[-1]
    live = [int(line.split()[0]) for line in shown]
    registers = int(re.search(r"registers (\d+), spills", text)[1])  # type: ignore[index]
    # A thread's registers hold what lives in the loop, and the loop lives on what came before.
    assert 0 < min(live) <= max(live) <= registers
    assert f"live registers, at most: {max(live)}, in the whole program" in text
    assert re.search(r"matrix instructions: \d+ HGMMA\.", text)
    assert re.search(r"global loads: \d+ LDG", text)


def test_live_registers_are_known_or_it_is_said_why(planted: Compiler) -> None:
    """Triton's nvdisasm can't follow an sm_80 binary, at least up to Triton 3.9."""
    text = sass.show_hot_loop(planted, "matmul", "sm_80", "dot/default_allowed")
    assert "HMMA" in text
    known = "live registers, at most" in text
    assert known != ("live registers not known: nvdisasm" in text)


def test_reads_a_listing_without_live_registers() -> None:
    plain = "\n".join(line.partition("//")[0] for line in SASS.splitlines())
    instructions = read_sass(plain)
    assert {each.live for each in instructions} == {None}
    assert hot_loop(instructions) == range(2, 4)


def test_amd_loop(planted: Compiler) -> None:
    text = sass.show_hot_loop(planted, "matmul", "gfx942", "dot/ieee")
    assert "live registers not known: no tool tells" in text
    assert "v_mfma" in text
    assert re.search(r"s_cbranch_\w+ \.LBB", text)
    assert "live registers, at most" not in text


def test_without_a_loop_all_is_shown(planted: Compiler) -> None:
    text = sass.show_hot_loop(planted, "copy_rows", "sm_90", "copy/aligned/meta")
    assert "no loop, so all of it" in text
    assert "global loads: 1 LDG.E.128" in text
    assert "EXIT" in text


def test_what_does_not_compile(planted: Compiler) -> None:
    with pytest.raises(DoesNotCompileError, match="matmul of does_not_compile .* for sm_90: "):
        sass.show_hot_loop(planted, "matmul", "sm_90", "does_not_compile")
