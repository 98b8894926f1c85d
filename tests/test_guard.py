"""The guarded interpreter: planted bugs are caught, right kernels pass, counts add up."""

import linecache
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import planted_bugs
import pytest
import torch
import triton
import triton.language as tl
from interpreter_cases import assert_same, dot_kernel, exp_kernel
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

import flamingo_fast
from flamingo_fast.testing import guard as guard_module
from flamingo_fast.testing.guard import (
    GuardError,
    IntegerOverflowError,
    NondeterminismError,
    OutOfBoundsError,
    RaceError,
    guard,
    missing_patch_points,
)
from flamingo_fast.testing.interpreter_patches import missing_names, replaced


def test_every_patch_point_exists():
    assert missing_patch_points() == []


def test_no_other_way_to_memory():
    """Pointers carry tags under the guard, so memory reached in a new way would be a crash."""
    touching = {
        name
        for name, function in vars(InterpreterBuilder).items()
        if {"load", "store", "atomic_rmw", "atomic_cas"}
        & set(getattr(getattr(function, "__code__", None), "co_names", ()))
        and "_interpreter" in function.__code__.co_names
    }
    assert touching == {
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
        "create_atomic_cas",
    }


def test_stock_interpreter_hides_a_missing_other():
    out = planted_bugs.PLANTED_BUGS["missing_other"].run(torch.ones(100), planted=True)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", planted_bugs.PLANTED_BUGS)
def test_planted_bug_is_caught(name):
    bug = planted_bugs.PLANTED_BUGS[name]
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    if bug.error is None:
        with guard(poison=bug.poison):
            wrong = bug.run(x, planted=True)
        # NaN, which missing data becomes, is far off too.
        assert not ((wrong - bug.expected(x)).abs() < 0.1).all()
        return
    with guard() as g, pytest.raises(bug.error) as raised:
        bug.run(x, planted=True)
    assert not g.launches
    line = re.search(r"planted_bugs\.py:(\d+)", str(raised.value))
    assert "# caught here" in linecache.getline(planted_bugs.__file__, int(line[1]))


def test_neither_poison_shows_what_the_other_does():
    x = torch.ones(1000)
    softmax = planted_bugs.PLANTED_BUGS["softmax_without_other"]
    with guard(poison="nan"):
        torch.testing.assert_close(softmax.run(x, planted=True), softmax.expected(x))
    out = torch.empty(4)
    with guard(poison="huge"):
        _zeroed_other_kernel[(1,)](x, out, BLOCK=4)
        assert out.eq(0).all()
    with guard(poison="nan"):
        _zeroed_other_kernel[(1,)](x, out, BLOCK=4)
        assert out.isnan().all()


@triton.jit
def _zeroed_other_kernel(X, OUT, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(OUT + offs, 0.0 * tl.load(X + offs, mask=offs < 0))


@pytest.mark.parametrize("name", planted_bugs.PLANTED_BUGS)
def test_kernel_without_the_bug_passes(name, guarded):
    bug = planted_bugs.PLANTED_BUGS[name]
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bug.run(x, planted=False), bug.expected(x))
    assert len(guarded.launches) == 1


@pytest.mark.parametrize("shuffle_seed", [None, 0, 1, 2, 3])
def test_programs_that_share_memory_are_caught_in_every_order(shuffle_seed):
    x = torch.randn(1000)
    with guard(shuffle_seed=shuffle_seed), pytest.raises(RaceError):
        planted_bugs.PLANTED_BUGS["halo_in_place"].run(x, planted=True)


@triton.jit
def _chain_kernel(X):
    program = tl.program_id(0)
    before = tl.load(X + program - 1, mask=program > 0, other=0)
    tl.store(X + program, before + 1)


def test_programs_may_not_load_what_others_wrote():
    with guard(shuffle_seed=None), pytest.raises(RaceError, match=r"\(1, 0, 0\).* loads what"):
        _chain_kernel[(4,)](torch.zeros(4, dtype=torch.int32))


@triton.jit
def _two_widths_kernel(WORDS, HALVES, half):
    if tl.program_id(0) == 0:
        tl.store(WORDS, 0)
    else:
        tl.store(HALVES + half, 0)


@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_races_between_accesses_of_different_width(shuffle_seed):
    words = torch.zeros(4, dtype=torch.int32)
    halves = words.view(torch.int16)
    with guard(shuffle_seed=shuffle_seed):
        _two_widths_kernel[(2,)](words, halves, 2)
        with pytest.raises(RaceError):
            _two_widths_kernel[(2,)](words, halves, 1)


def test_gaps_of_a_view_are_out_of_bounds(guarded):
    view, out = torch.zeros(2, 53)[:, :50], torch.empty(50)
    with pytest.raises(OutOfBoundsError, match="3 of 53 lanes .* byte offsets 200 to 208"):
        planted_bugs._row_gap_kernel[(1,)](view, out, 50, 53, BLOCK=64, planted=True)


def test_bounds_are_those_of_the_argument_not_of_its_neighbours(guarded):
    both = torch.zeros(256)
    left, right = both[:100], both[128:]
    bug = planted_bugs.PLANTED_BUGS["missing_mask"]
    out = torch.empty(100)
    kernel = planted_bugs._off_by_one_kernel
    with pytest.raises(OutOfBoundsError, match=r"1 of 37 lanes outside argument 'X'"):
        kernel[(2,)](left, out, 100, BLOCK=64, planted=True)
    assert_same(bug.run(right, planted=False), 2 * right)


@triton.jit
def _select_kernel(X, Y, OUT, width, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(OUT + offs, tl.load(tl.where(offs < width, X + offs, Y + offs)))


def test_lanes_of_one_load_may_come_from_two_arguments(guarded):
    x, y = torch.rand(32), torch.rand(64)
    out = torch.empty(64)
    _select_kernel[(1,)](x, y, out, 32, BLOCK=64)
    assert_same(out, torch.cat([x, y[32:]]))
    with pytest.raises(OutOfBoundsError, match="'X'"):
        _select_kernel[(1,)](x, y, out, 33, BLOCK=64)


@triton.jit
def _helper(X, offs):
    return tl.load(X + offs)


@triton.jit
def _caller_kernel(X, OUT, first, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(OUT + offs, _helper(X, first + offs))


def test_error_in_a_device_function_names_its_line(guarded):
    x = torch.ones(64)
    with pytest.raises(OutOfBoundsError, match="'X'") as raised:
        _caller_kernel[(1,)](x, torch.empty(64), -1, BLOCK=64)
    line = re.search(r"test_guard\.py:(\d+)", str(raised.value))
    assert "tl.load(X + offs)" in linecache.getline(__file__, int(line[1]))


def test_other_errors_of_a_kernel_pass_through(guarded):
    x = torch.ones(1).bfloat16()
    with pytest.raises(InterpreterError, match="bf16") as raised:
        exp_kernel[(1,)](x, torch.empty_like(x))
    assert isinstance(raised.value.__cause__, ValueError)


@triton.jit
def _add_kernel(X, OUT, value):
    tl.store(OUT, tl.load(X) + value)


def test_only_signed_32_bit_integers_may_not_wrap(guarded):
    for dtype, wraps in ((torch.int32, True), (torch.uint32, False), (torch.int64, False)):
        x = torch.tensor([torch.iinfo(dtype).max], dtype=dtype)
        if wraps:
            with pytest.raises(IntegerOverflowError, match="the exact result is 2147483648"):
                _add_kernel[(1,)](x, torch.empty_like(x), 1)
        else:
            _add_kernel[(1,)](x, torch.empty_like(x), 1)


@triton.jit
def _atomic_kernel(COUNTER, ORDER, offset):
    turn = tl.atomic_add(COUNTER + offset, 1)
    tl.store(ORDER + tl.program_id(0) * 6 + tl.program_id(1) * 2 + tl.program_id(2), turn)


def order_of_programs(shuffle_seed: int | None) -> list[int]:
    counter = torch.zeros(1, dtype=torch.int32)
    order = torch.empty(24, dtype=torch.int32)
    with guard(shuffle_seed=shuffle_seed) as g:
        _atomic_kernel[(4, 3, 2)](counter, order, 0)
    assert g.launches[0].grid == (4, 3, 2)
    return order.tolist()


def test_programs_run_in_a_seeded_order():
    assert order_of_programs(None) == list(range(24))
    assert order_of_programs(0) == order_of_programs(0)
    assert len({tuple(order_of_programs(seed)) for seed in (None, 0, 1)}) == 3
    assert sorted(order_of_programs(0)) == list(range(24))


@triton.jit
def _cas_kernel(LOCK, VALUE, offset):
    tl.store(VALUE, tl.atomic_cas(LOCK + offset, 0, 1))


def test_bounds_of_integer_atomics(guarded):
    counter, order = torch.zeros(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    with pytest.raises(OutOfBoundsError, match="atomic: 1 of 1 lanes outside argument 'COUNTER'"):
        _atomic_kernel[(1,)](counter, order, 1)
    with pytest.raises(OutOfBoundsError, match="atomic: 1 of 1 lanes outside argument 'LOCK'"):
        _cas_kernel[(1,)](counter, order, 1)
    _cas_kernel[(1,)](counter, order, 0)
    assert counter.item() == 1
    assert guarded.launches[0].bytes_loaded == 4
    assert guarded.launches[0].bytes_stored == 8


@triton.jit
def _float_cas_kernel(X, Y):
    tl.atomic_cas(X, tl.load(Y), tl.load(Y))


def test_float_compare_and_swap_is_refused(guarded):
    with pytest.raises(NondeterminismError, match="fp32"):
        _float_cas_kernel[(1,)](torch.zeros(1), torch.zeros(1))


@triton.jit
def _descriptor_kernel(X, OUT, rows, cols, M: tl.constexpr, N: tl.constexpr):
    x = tl.make_tensor_descriptor(X, shape=[rows, cols], strides=[cols, 1], block_shape=[M, N])
    out = tl.make_tensor_descriptor(OUT, shape=[rows, cols], strides=[cols, 1], block_shape=[M, N])
    row = tl.program_id(0) * M
    out.store([row, 0], x.load([row, 0]) * 2)


@triton.jit
def _host_descriptor_kernel(X, OUT, M: tl.constexpr):
    row = tl.program_id(0) * M
    OUT.store([row, 0], X.load([row, 0]) * 2)


def test_tensor_descriptors(guarded):
    x = torch.randn(10, 16)
    out = torch.empty_like(x)
    _descriptor_kernel[(2,)](x, out, 10, 16, M=8, N=16)
    assert_same(out, 2 * x)
    out = torch.empty_like(x)
    x_tiles, out_tiles = (TensorDescriptor.from_tensor(tensor, [8, 16]) for tensor in (x, out))
    _host_descriptor_kernel[(2,)](x_tiles, out_tiles, M=8)
    assert_same(out, 2 * x)
    # Rows past the end are masked off, in bytes too.
    assert [launch.bytes_loaded for launch in guarded.launches] == [640, 640]
    assert [launch.sectors_stored for launch in guarded.launches] == [640, 640]
    with pytest.raises(OutOfBoundsError, match="load: 16 of 48 lanes outside argument 'X'"):
        _descriptor_kernel[(2,)](x, out, 11, 16, M=8, N=16)


@triton.jit
def _pointer_table_kernel(TABLE, X, OUT, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    source = tl.load(TABLE).to(X.dtype)
    tl.store(OUT + offs, tl.load(source + offs))


def test_pointers_from_a_table_are_checked_against_all_arguments(guarded):
    x, stranger = torch.randn(64), torch.randn(64)
    out = torch.empty(64)
    _pointer_table_kernel[(1,)](torch.tensor([x.data_ptr()]), x, out, BLOCK=64)
    assert_same(out, x)
    with pytest.raises(OutOfBoundsError, match="64 lanes outside every tensor argument; nearest"):
        _pointer_table_kernel[(1,)](torch.tensor([stranger.data_ptr()]), x, out, BLOCK=64)


@triton.jit
def _strided_copy_kernel(
    X, OUT, x_stride, x_step, out_stride, out_step, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    x = tl.load(X + row * x_stride + cols * x_step, mask=cols < width, other=0.0)
    tl.store(OUT + row * out_stride + cols * out_step, x, mask=cols < width)


def strided_copy(x: torch.Tensor, out: torch.Tensor) -> None:
    _strided_copy_kernel[(x.shape[0],)](
        x, out, *x.stride(), *out.stride(), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1])
    )


def test_views_of_one_storage_do_not_race(guarded):
    x = torch.randn(6, 2, 10)
    both = torch.empty(6, 2, 10)
    strided_copy(x[:, 0], both[:, 0])
    strided_copy(x[:, 1], both[:, 1])
    assert_same(both, x)
    strided_copy(both[:, 0], both[:, 1])
    assert_same(both[:, 1], x[:, 0])
    transposed = torch.empty(10, 6).t()
    strided_copy(x[:, 0], transposed)
    assert_same(transposed, x[:, 0])
    windows = torch.arange(20.0).unfold(0, 10, 2)
    out = torch.empty(6, 10)
    strided_copy(torch.randn(1, 10).expand(6, 10), out)
    strided_copy(windows, out)
    assert_same(out, windows)


def test_empty_arguments_may_not_be_touched(guarded):
    x = torch.ones(4, 0)
    _strided_copy_kernel[(4,)](x, torch.empty(4, 0), 0, 1, 0, 1, 0, BLOCK=4)
    with pytest.raises(OutOfBoundsError, match="1 of 1 lanes outside argument 'X'"):
        _add_kernel[(1,)](x, torch.empty(1), 1.0)


def test_counts_of_a_copy(guarded):
    rows, width = 50, 100
    strided_copy(torch.randn(rows, width), torch.empty(rows, width))
    strided_copy(torch.randn(rows, 2 * width)[:, ::2], torch.empty(rows, width))
    strided_copy(torch.randn(1, width).expand(rows, width), torch.empty(rows, width))
    nbytes = rows * width * 4
    dense, every_second, expanded = guarded.launches
    assert (dense.bytes_loaded, dense.bytes_stored) == (nbytes, nbytes)
    assert (dense.sectors_loaded, dense.sectors_stored) == (nbytes, nbytes)
    assert (every_second.bytes_loaded, every_second.sectors_loaded) == (nbytes, 2 * nbytes)
    assert expanded.bytes_loaded == nbytes
    assert expanded.sectors_loaded == -(-width * 4 // 32) * 32
    assert (dense.kernel, dense.grid) == ("_strided_copy_kernel", (rows, 1, 1))
    assert guarded.total().bytes_stored == 3 * nbytes
    assert guarded.total("another_kernel").bytes_stored == 0


def test_counts_of_a_dot(guarded):
    m, n, k = 32, 16, 64
    a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
    dot_kernel[(1,)](a, b, torch.empty(m, n), M=m, N=n, K=k)
    (launch,) = guarded.launches
    assert launch.dot_flops == 2 * m * n * k
    assert launch.bytes_loaded == launch.sectors_loaded == 2 * (m * k + k * n)
    assert launch.bytes_stored == launch.sectors_stored == 4 * m * n


def test_launches_inside_ops_and_backward_are_guarded(guarded):
    x = torch.randn(5, 70, requires_grad=True)
    (grad,) = torch.autograd.grad(flamingo_fast.squared_relu(x, impl="triton").sum(), x)
    assert_same(grad, 2 * x.relu().detach())
    assert [launch.bytes_loaded for launch in guarded.launches] == [1400, 2800]


def test_uninitialised_memory_is_poisoned():
    x = torch.ones(2)
    with guard():
        poisoned = [
            torch.empty(2),
            torch.empty(2, dtype=torch.bfloat16, requires_grad=True),
            torch.empty_like(x),
            torch.empty_strided((2, 2), (1, 2)),
            x.new_empty(2),
        ]
        assert all(tensor.isnan().all() for tensor in poisoned)
        assert (torch.empty(2, dtype=torch.int32) > 2**29).all()
        assert torch.empty(2, device="meta").is_meta
        with FakeTensorMode():
            assert torch.empty(2).shape == (2,)
    assert not torch.are_deterministic_algorithms_enabled()
    with guard(poison=None):
        assert not torch.are_deterministic_algorithms_enabled()
        out = planted_bugs.PLANTED_BUGS["missing_other"].run(torch.ones(10), planted=True)
        assert out.isfinite().all()


def test_settings_of_determinism_are_restored():
    torch.use_deterministic_algorithms(True)
    try:
        with guard():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@triton.jit
def _unmasked_other_kernel(X, OUT, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(OUT + offs, tl.load(X + offs, mask=offs < 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_lanes_are_nan_or_huge(dtype):
    x, out = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    with guard():
        _unmasked_other_kernel[(1,)](x, out, BLOCK=4)
    assert out.isnan().all()
    with guard(poison="huge"):
        _unmasked_other_kernel[(1,)](x, out, BLOCK=4)
    assert (out == torch.finfo(dtype).max).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_masked_lanes_are_large_integers(dtype, guarded):
    out = torch.zeros(4, dtype=dtype)
    _unmasked_other_kernel[(1,)](torch.ones(4, dtype=dtype), out, BLOCK=4)
    assert (out == torch.iinfo(dtype).max // 2).all()


def test_torch_compile_inside_the_block(guarded):
    def scaled(x):
        return flamingo_fast.squared_relu(x, impl="triton") + torch.empty_like(x).fill_(1)

    x = torch.randn(3, 40)
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), scaled(x))
    assert len(guarded.launches) == 2


class TestWithoutTheFixture:
    @pytest.fixture(autouse=True)
    def interpreter_bf16(self) -> Iterator[None]:
        """Overrides conftest's: the guard must bring bf16 itself."""
        yield

    def test_bf16_is_right(self):
        x = torch.randn(1000)
        with guard():
            assert_same(planted_bugs.to_bf16(x, planted=False), x.bfloat16())


def test_everything_is_restored():
    names = [*guard_module.Guard(shuffle_seed=0, poison="nan")._replacements()]
    before = [vars(owner)[name] for owner, name in names]
    with pytest.raises(GuardError), guard():
        planted_bugs.PLANTED_BUGS["missing_mask"].run(torch.ones(10), planted=True)
    assert [vars(owner)[name] for owner, name in names] == before
    with guard():
        assert [vars(owner)[name] for owner, name in names] != before
    assert [vars(owner)[name] for owner, name in names] == before


def test_names_that_a_patch_adds_go_again():
    class Owner:
        pass

    with replaced({(Owner, "added"): lambda stock, self, value: (stock, value)}):
        assert Owner().added(3) == (None, 3)
        assert missing_names({(Owner, "added"): len, (Owner, "gone"): len}) == ["Owner.gone"]
    assert not hasattr(Owner, "added")


def test_guards_do_not_nest():
    with guard(), pytest.raises(RuntimeError, match="already active"), guard():
        pass
    with guard():
        pass


def test_guard_needs_the_interpreter():
    code = "from flamingo_fast.testing.guard import guard\nwith guard(): pass"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert (
        "RuntimeError: guard() needs Triton's interpreter: set TRITON_INTERPRET=1" in result.stderr
    )
