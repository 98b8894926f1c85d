"""The ahead-of-time gate: planted faults are caught, and the kernels' goldens hold."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from triton.runtime import JITFunction

import flamingo_fast
from flamingo_fast import cli
from flamingo_fast.testing import aot, aot_gate, goldens
from flamingo_fast.testing.aot import TARGETS, Compiled, Compiler, PlannedCompile, Rules, source_of
from flamingo_fast.testing.aot_gate import BadSelectionError, Selection, render, run_gate
from flamingo_fast.testing.binaries import Binary, read_amd, read_nvidia
from flamingo_fast.testing.goldens import (
    Golden,
    Goldens,
    changed,
    failures,
    golden_of,
    key_of,
    load_goldens,
    rotating_sample,
    save_goldens,
)
from flamingo_fast.testing.occupancy import Occupancy, occupancy


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler(workers=1) as compiler:
        yield compiler


@pytest.fixture(scope="module")
def planted() -> Iterator[Compiler]:
    with Compiler("planted_aot", workers=1) as compiler:
        yield compiler


@pytest.fixture(scope="module")
def planted_plans(planted: Compiler) -> dict[tuple[str, str], PlannedCompile]:
    plans = planted.plan(("sm_80", "sm_90", "sm_120", "gfx942"))
    return {(plan.case, plan.target): plan for plan in plans}


@pytest.mark.parametrize(
    ("case", "target", "expected"),
    [
        ("dot/default", "sm_90", ["TF32 in a kernel that did not ask for it"]),
        ("dot/default_allowed", "sm_90", []),
        ("dot/ieee", "sm_90", []),
        ("dot/128_kib", "sm_120", ["shared memory: 131072 B, limit 101376 B"]),
        ("dot/128_kib", "sm_80", []),
        ("dot/128_kib", "gfx942", ["shared memory: 131072 B, limit 65536 B"]),
        ("softmax/may_spill", "sm_80", []),
        ("copy/aligned/meta", "sm_80", []),
        (
            "copy/odd_stride/meta",
            "sm_80",
            [
                "widest global load: 16 bits, required 128",
                "widest global store: 16 bits, required 128",
            ],
        ),
    ],
)
def test_planted_faults(
    planted: Compiler,
    planted_plans: dict[tuple[str, str], PlannedCompile],
    case: str,
    target: str,
    expected: list[str],
) -> None:
    (outcome,) = planted.compile([planted_plans[case, target]])
    assert failures(outcome, goldens=None) == expected


def test_spills_are_caught(
    planted: Compiler, planted_plans: dict[tuple[str, str], PlannedCompile]
) -> None:
    (outcome,) = planted.compile([planted_plans["softmax/spilling", "sm_80"]])
    (failure,) = failures(outcome, goldens=None)
    assert failure.startswith("spills: ")


def test_a_kernel_that_does_not_compile_fails_alone(
    planted: Compiler, planted_plans: dict[tuple[str, str], PlannedCompile]
) -> None:
    plans = [planted_plans[case, "sm_80"] for case in ("does_not_compile", "copy/aligned/meta")]
    verdicts = {outcome.plan.case: failures(outcome, None) for outcome in planted.compile(plans)}
    assert verdicts["copy/aligned/meta"] == []
    assert "power of 2" in verdicts["does_not_compile"][0]


def test_specialization_is_that_of_a_launch(
    planted_plans: dict[tuple[str, str], PlannedCompile],
) -> None:
    """In Triton's key, D is an address, size or stride that 16 divides, and a 1 is a constant."""
    expected = {
        "aligned": "('*bf16', 'D'), ('*bf16', 'D'), ('i32', 'D'), ('constexpr', 1024)",
        "odd_stride": "('*bf16', 'D'), ('*bf16', 'D'), ('i32', ''), ('constexpr', 1024)",
        "odd_address": "('*bf16', ''), ('*bf16', ''), ('i32', 'D'), ('constexpr', 1024)",
        "stride_1": "('*bf16', 'D'), ('*bf16', 'D'), ('constexpr', 1), ('constexpr', 1024)",
    }
    for layout, arguments in expected.items():
        plan = planted_plans[f"copy/{layout}/meta", "sm_90"]
        assert plan.specialization.startswith(f"[{arguments}]"), layout
        # Memory that exists, so addresses that Triton would see at a launch.
        assert plan.source == planted_plans[f"copy/{layout}/cpu", "sm_90"].source, layout


def test_equal_launches_are_compiled_once(
    planted_plans: dict[tuple[str, str], PlannedCompile],
) -> None:
    plans = planted_plans
    default, allowed = plans["dot/default", "sm_90"], plans["dot/default_allowed", "sm_90"]
    assert default.source == allowed.source
    assert default.source != plans["dot/ieee", "sm_90"].source
    assert default.source != plans["dot/default", "sm_80"].source


_BINARY = Binary(
    num_warps=4,
    registers=100,
    local_bytes=0,
    spills=0,
    shared_bytes=1024,
    tensor_memory=0,
    matrix_instructions=16,
    wgmma=16,
    load_bits=128,
    store_bits=64,
    tf32=False,
    instructions=500,
)


def _outcome(case: str = "op/bf16", source: str = "1", **numbers: int) -> Compiled:
    plan = PlannedCompile(case, "sm_90", "_kernel", 0, source, "", Rules(may_spill="x"))
    return Compiled(plan, dataclasses.replace(_BINARY, **numbers))


def _goldens_of(*outcomes: Compiled) -> Goldens:
    return {key_of(outcome.plan): golden_of(outcome) for outcome in outcomes}


@pytest.mark.parametrize(
    ("numbers", "failure"),
    [
        ({"registers": 108}, None),
        ({"registers": 109}, "registers: 109, golden 100"),
        ({"registers": 90, "matrix_instructions": 32}, None),
        ({"matrix_instructions": 15}, "matrix_instructions: 15, golden 16"),
        ({"load_bits": 64}, "load_bits: 64, golden 128"),
        ({"store_bits": 32}, "store_bits: 32, golden 64"),
        ({"shared_bytes": 0}, None),
        ({"shared_bytes": 1025}, "shared_bytes: 1025, golden 1024"),
        ({"local_bytes": 40}, "local_bytes: 40, golden 0"),
    ],
)
def test_regressions_against_a_golden(numbers: dict[str, int], failure: str | None) -> None:
    expected = [] if failure is None else [failure]
    assert failures(_outcome(**numbers), _goldens_of(_outcome())) == expected
    assert failures(_outcome(**numbers), goldens=None) == []


@pytest.mark.parametrize(
    ("target", "numbers", "failure"),
    [
        ("sm_90", {}, None),
        ("sm_90", {"wgmma": 15}, "1 matrix instructions other than wgmma"),
        ("sm_80", {"wgmma": 0}, None),
        ("sm_80", {"wgmma": 0, "matrix_instructions": 0}, "no matrix instructions"),
        ("gfx942", {"wgmma": 0, "matrix_instructions": 0}, "no matrix instructions"),
        ("sm_90", {"registers": 255}, None),
        ("sm_90", {"registers": 255, "num_warps": 8}, "blocks an SM: 1, required 2"),
        ("sm_80", {"shared_bytes": 90 * 1024}, "blocks an SM: 1, required 2"),
        ("sm_120", {"shared_bytes": 90 * 1024}, None),
        ("sm_100", {"tensor_memory": 512}, None),
        ("sm_100", {"tensor_memory": 576}, "tensor memory: 576 columns, limit 512"),
    ],
)
def test_rules_of_attention(target: str, numbers: dict[str, int], failure: str | None) -> None:
    rules = Rules(tensor_cores=("_kernel",), wgmma=("_kernel",), two_blocks=("_kernel",))
    outcome = _outcome(**numbers)
    plan = dataclasses.replace(outcome.plan, target=target, rules=rules)
    expected = [] if failure is None else [failure]
    assert failures(dataclasses.replace(outcome, plan=plan), goldens=None) == expected


def test_a_kernel_without_a_golden_fails() -> None:
    (failure,) = failures(_outcome("op/new"), _goldens_of(_outcome()))
    assert "--update" in failure


def test_goldens_survive_their_file(tmp_path: Path) -> None:
    saved = _goldens_of(_outcome("b"), _outcome("a"))
    path = save_goldens(saved, "3.9.0", tmp_path)
    assert load_goldens("3.9.0", tmp_path) == saved
    assert load_goldens("3.8.0", tmp_path) is None
    assert list(json.loads(path.read_text())) == ["a", "b"]


def test_changed_and_sample() -> None:
    outcomes = [_outcome(f"op/{index}") for index in range(20)]
    plans = [outcome.plan for outcome in outcomes]
    edited = [dataclasses.replace(plans[3], source="2"), *plans[4:]]
    assert changed(edited, _goldens_of(*outcomes[:-1])) == [edited[0], plans[-1]]
    samples = [rotating_sample(plans, 5, revision) for revision in ("a", "a", "b")]
    assert samples[0] == samples[1] != samples[2]
    assert len(samples[0]) == 5
    everything = {plan.case for r in range(50) for plan in rotating_sample(plans, 5, str(r))}
    assert len(everything) == len(plans)


_SOURCE = """
import triton.language as tl
from triton.runtime import JITFunction

SCALE = tl.constexpr(2.0)

@JITFunction
def callee(x):
    return x + 1.0

@JITFunction
def kernel(X):
    x = tl.load(X)  # one element
    tl.store(X, callee(x) * SCALE)
"""


def _kernel_from(path: Path, source: str) -> JITFunction[Any]:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("source_of_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("\nimport", "\n\n\n\nimport", True),
        ("# one element", "# a scalar", True),
        ("load(X)", "load(X + 1)", False),
        ("x + 1.0", "x + 3.0", False),
        ("constexpr(2.0)", "constexpr(4.0)", False),
    ],
)
def test_source_is_code_and_not_its_place(tmp_path: Path, old: str, new: str, same: bool) -> None:
    before = _kernel_from(tmp_path / "before.py", _SOURCE)
    after = _kernel_from(tmp_path / "after.py", _SOURCE.replace(old, new))
    assert (source_of(before) == source_of(after)) == same


def test_reading_sass() -> None:
    usage = " Function k:\n  REG:40 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:400 TEXTURE:0\n"
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R16, desc[UR4][R20.64] ;
        /*0020*/             @!UPT LDGSTS.E.BYPASS.LTC128B.64 [R5], desc[UR4][R20.64] ;
        /*0030*/                   HFMA2.MMA R3, -RZ, RZ, 0, 0 ;
        /*0040*/                   HGMMA.64x128x8.F32.TF32 R24, gdesc[UR4], R24 ;
        /*0050*/                   STL.64 [R1], R4 ;
        /*0060*/               @P1 STG.E desc[UR4][R22.64], R4 ;
        /*0070*/                   NOP ;
    """
    binary = read_nvidia(usage, sass, ".visible .entry my_tf32_kernel(", 4, dynamic_shared=2048)
    assert binary == Binary(4, 40, 8, 1, 2048, 0, 1, 1, 64, 32, True, 7)
    ptx = "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {"
    assert read_nvidia(usage, "", ptx, 4, 0).tf32
    assert not read_nvidia(usage, "", "// my_tf32_kernel", 4, 0).tf32


def test_reading_amd_assembly() -> None:
    assembly = """
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
\tbuffer_load_dwordx3 v[0:3], v16, s[12:15], 0 offen
\tglobal_load_ushort v4, v[0:1], off
\tv_mfma_f32_32x32x4_xf32 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_nop 1
\tglobal_store_short_d16_hi v[0:1], v4, off
\ts_endpgm
\t.amdhsa_kernel k
    .private_segment_fixed_size: 4
    .vgpr_count:     33
    .vgpr_spill_count: 1
"""
    assert read_amd(assembly, 8, 512) == Binary(8, 33, 4, 1, 512, 0, 1, 0, 96, 16, True, 6)


@pytest.mark.parametrize(
    ("arch", "registers", "num_warps", "shared_kib", "blocks", "warps"),
    [
        ("sm_80", 32, 4, 0, 16, 64),
        ("sm_80", 255, 4, 0, 2, 8),
        ("sm_80", 32, 1, 0, 32, 32),
        ("sm_80", 32, 4, 48, 3, 12),
        ("sm_89", 32, 4, 0, 12, 48),
        ("sm_89", 32, 1, 0, 24, 24),
        ("sm_90", 168, 4, 0, 3, 12),
        ("sm_90", 114, 4, 0, 4, 16),
        ("sm_90", 33, 8, 0, 6, 48),
        ("sm_90", 64, 4, 113, 2, 8),
        ("sm_90", 64, 4, 114, 1, 4),
        ("sm_100", 64, 32, 0, 1, 32),
        ("sm_120", 64, 4, 99, 1, 4),
        ("sm_120", 64, 4, 100, 0, 0),
        ("gfx942", 128, 4, 0, 4, 16),
        ("gfx942", 129, 4, 0, 3, 12),
        ("gfx942", 64, 4, 33, 1, 4),
    ],
)
def test_occupancy(
    arch: str, registers: int, num_warps: int, shared_kib: int, blocks: int, warps: int
) -> None:
    assert occupancy(arch, registers, num_warps, shared_kib * 1024) == Occupancy(blocks, warps)


@pytest.fixture(scope="module")
def plans(compiler: Compiler) -> list[PlannedCompile]:
    return compiler.plan()


def test_goldens_are_those_of_the_cases(compiler: Compiler, plans: list[PlannedCompile]) -> None:
    """A stale golden would never be compared, a missing one only when its kernel is compiled."""
    version = compiler.triton_version()
    known = load_goldens(version)
    if known is None:
        pytest.skip(f"there are no goldens for Triton {version}")
    assert set(known) == {key_of(plan) for plan in plans}


def test_spills_are_excused_only_where_they_may_be(plans: list[PlannedCompile]) -> None:
    excused = {plan.case for plan in plans if plan.rules.may_spill}
    assert all("/fp32" in case or case.endswith(("/1", "x256")) for case in excused), excused


def test_goldens_spill_in_fp32_and_at_head_dim_256_alone(compiler: Compiler) -> None:
    """Of all kernels, as `flamingo-fast kernels` found them; a golden is of the source that is."""
    known = load_goldens(compiler.triton_version())
    if known is None:
        pytest.skip(f"there are no goldens for Triton {compiler.triton_version()}")
    spilling = {
        case for (case, _, _), golden in known.items() if golden.local_bytes and "/fp32" not in case
    }
    assert len(spilling) == 4 and all(case.endswith("x256") for case in spilling), spilling


def test_kernels_that_changed_and_a_sample(
    compiler: Compiler, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_gate(compiler, Selection(changed=True, sample=4))
    Console(width=200).print(render(report))
    assert report.passed, capsys.readouterr().out
    assert len(report.verdicts) >= 4


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "numbers.json"
    options = ("--target", "sm_90", "--case", "squared_relu_fwd/fp16", "--json", str(file))
    assert _run_command(monkeypatch, *options) == 0
    (numbers,) = json.loads(file.read_text())
    assert (numbers["case"], numbers["target"]) == ("squared_relu_fwd/fp16", "sm_90")
    assert numbers["failures"] == []
    assert numbers["registers"] > 0
    assert numbers["warps_per_sm"] == numbers["blocks_per_sm"] * numbers["num_warps"]


def _run_command(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["flamingo-fast", "kernels", *options])
    try:
        cli.main()
    except SystemExit as exit:
        return exit.code or 0
    return 0


def test_a_failed_check_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    report = aot_gate.GateReport([aot_gate.Verdict(_outcome(), ["spills"])], [])
    monkeypatch.setattr(aot_gate, "run_gate", lambda *_, **__: report)
    assert _run_command(monkeypatch) == 1


def test_an_unknown_target_is_bad_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run_command(monkeypatch, "--target", "sm_91") == 2
    error = capsys.readouterr().err
    assert "sm_91" in error
    assert all(target in error for target in TARGETS)


def test_an_unknown_case_is_bad_usage(planted: Compiler) -> None:
    with pytest.raises(BadSelectionError, match="attention"):
        run_gate(planted, Selection(case="attention"))


def test_update_outside_a_checkout_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot_gate, "checkout", lambda: None)
    assert _run_command(monkeypatch, "--update") == 2
    assert "source tree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "passes"), [("copy/aligned/meta", 1), ("copy/odd_stride/meta", 0)]
)
def test_update_writes_what_passes_and_keeps_the_rest(
    case: str, passes: bool, planted: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = planted.triton_version()
    kept = _goldens_of(_outcome("other/bf16"))
    save_goldens(kept, version, tmp_path)
    monkeypatch.setattr(aot_gate, "checkout", lambda: tmp_path)
    monkeypatch.setattr(aot_gate, "load_goldens", lambda v: load_goldens(v, tmp_path))
    monkeypatch.setattr(aot_gate, "save_goldens", lambda g, v: save_goldens(g, v, tmp_path))
    selection = Selection(("sm_80",), case=case)
    assert run_gate(planted, selection, update=True).passed == passes
    written = load_goldens(version, tmp_path)
    assert set(written) == {*kept, *[(case, "sm_80", "copy_rows")] * passes}
    assert all(isinstance(golden, Golden) for golden in written.values())
    assert run_gate(planted, selection).passed == passes


def test_triton_absent_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "TRITON_INSTALLED", False)
    assert _run_command(monkeypatch) == 1
    assert "Triton is not installed" in capsys.readouterr().err


def test_the_sample_moves_with_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    def commit() -> str:
        git("commit", "--quiet", "--allow-empty", "--message", "test")
        return goldens.revision()

    monkeypatch.setattr(goldens, "checkout", lambda: tmp_path)
    git("init", "--quiet")
    assert goldens.revision() == flamingo_fast.__version__
    assert commit() != commit()
