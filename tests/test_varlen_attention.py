"""The backends `varlen`, `flash_attn` and `xformers`: their metadata, adapters and refusals.

Their kernels need a GPU; here a loop over the sequences takes their place.
"""

import dataclasses
import functools
import inspect
import sys
import types

import pytest
import torch
import varlen_cases
from attention_contract import no_host_sync
from torch._subclasses.fake_tensor import FakeTensorMode
from varlen_cases import (
    ADAPTERS,
    LAYOUTS,
    R,
    attend_by_sequences,
    make_inputs,
    make_previous,
    make_random,
    make_shuffled,
    older_varlen_attn,
    stand_in_of_varlen_attn,
)
from xformers.ops.fmha.attn_bias import BlockDiagonalMask

import flamingo_fast as ff
from flamingo_fast import reference
from flamingo_fast.ops import varlen_attention as varlen
from flamingo_fast.testing.inputs import random_tensor

every_layout = pytest.mark.parametrize("make_layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def _expected_mask(layout) -> torch.Tensor:
    """(B * L, media_total * R) bool: which tokens of k each row attends to."""
    mask = torch.zeros(layout.batch_size, layout.seqlen, layout.media_total, R, dtype=torch.bool)
    of_sample = layout.to_mask()
    for sample, (first, end) in enumerate(zip(layout.cu_media, layout.cu_media[1:], strict=False)):
        mask[sample, :, first:end] = of_sample[sample, :, : end - first, None]
    if layout.media_seqlens is not None:
        mask &= torch.arange(R) < layout.media_seqlens[:, None]
    return mask.flatten(2).flatten(0, 1)


def _sequences(metadata):
    """Ranges of rows and of keys."""
    q, k = metadata.cu_seqlens_q.tolist(), metadata.cu_seqlens_k.tolist()
    assert len(q) == len(k)
    return [
        (slice(*rows), slice(*keys))
        for rows, keys in zip(zip(q, q[1:], strict=False), zip(k, k[1:], strict=False), strict=True)
    ]


def _in_order(mask, metadata) -> torch.Tensor:
    """`mask` of sorted rows as that of the batch's rows."""
    if metadata.row_index is None:
        return mask
    unsorted = torch.empty_like(mask)
    unsorted[metadata.row_index.long()] = mask
    return unsorted


def _expanded(layout, metadata) -> torch.Tensor:
    mask = torch.zeros(layout.batch_size * layout.seqlen, layout.media_total * R, dtype=torch.bool)
    for rows, keys in _sequences(metadata):
        mask[rows, keys] = True
    return _in_order(mask, metadata)


@every_layout
def test_metadata_is_the_mask(make_layout):
    layout = make_layout()
    metadata = varlen.varlen_metadata(layout, R)
    assert torch.equal(_expanded(layout, metadata), _expected_mask(layout))


@every_layout
def test_sequences_cover_all_rows_and_keys_within_their_bounds(make_layout):
    layout = make_layout()
    metadata = varlen.varlen_metadata(layout, R)
    for cu_seqlens, longest, total in (
        (metadata.cu_seqlens_q, metadata.max_seqlen_q, layout.batch_size * layout.seqlen),
        (metadata.cu_seqlens_k, metadata.max_seqlen_k, layout.media_total * R),
    ):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens.is_contiguous()
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, total)
        assert 0 <= cu_seqlens.diff().min() <= cu_seqlens.diff().max() <= longest
    assert metadata.max_seqlen_q == max(layout.seqlen, 2)
    assert metadata.max_seqlen_k == R


def test_rows_are_gathered_only_where_those_of_a_medium_are_scattered():
    layout = make_shuffled()
    assert varlen.varlen_metadata(layout, R).row_index is layout.row_index is not None
    assert varlen.varlen_metadata(make_random("next", 0), R).row_index is None


def test_the_rows_of_a_long_run_without_media_are_cut():
    """The kernels' grids end at max_seqlen_q."""
    for layout in (
        make_previous([()] * 5 + [(3,)] + [()] * 5, 8),
        ff.MediaLayout.from_intervals(torch.zeros(11, 8).int(), torch.zeros(11, 8).int(), 1, 1),
    ):
        cu_seqlens = varlen.varlen_metadata(layout, R).cu_seqlens_q
        assert cu_seqlens.diff().max() == 8


LARGEST, LOWEST = 2**31 - 1, -(2**31)


@pytest.mark.parametrize("wrong", ["media_start", "media_end", "cu_media", "media_seqlens"])
@pytest.mark.parametrize("name", ["seqlens", "any_order_seqlens"])
def test_values_that_nobody_validated_stay_in_bounds(name, wrong):
    layout = LAYOUTS[name]()
    generator = torch.Generator().manual_seed(0)
    for low, high in ((-9, 9), (LOWEST, LARGEST)):
        old = getattr(layout, wrong)
        garbage = torch.randint(low, high, old.shape, generator=generator, dtype=torch.int32)
        metadata = varlen.varlen_metadata(dataclasses.replace(layout, **{wrong: garbage}), R)
        for cu_seqlens, total in (
            (metadata.cu_seqlens_q, layout.batch_size * layout.seqlen),
            (metadata.cu_seqlens_k, layout.media_total * R),
        ):
            assert cu_seqlens[0] == 0
            assert cu_seqlens.diff().min() >= 0
            assert cu_seqlens[-1] <= total


@pytest.mark.parametrize("layout_name", ["previous_0", "seqlens", "any_order", "packed", "decode"])
@pytest.mark.parametrize("library", ["varlen", "flash_attn", "flash_attn_4", "xformers"])
def test_no_host_sync(library, layout_name, monkeypatch):
    """Needs tensors that are not on the CPU; those of the meta device will do."""
    adapter = ADAPTERS[library][0]
    layout = LAYOUTS[layout_name]().to("meta")
    inputs = [x.detach().to("meta").requires_grad_() for x in make_inputs(layout)]

    @functools.wraps(ADAPTERS[library][2])
    def attend(q, k, v, *_args, **_kwargs):
        return q + k.sum() + v.sum()

    others = {"flash_attn_4": None} if library == "flash_attn" else {}
    _install(monkeypatch, {**others, library: attend})
    with no_host_sync():
        out = adapter(*inputs, layout, 1.0)
        gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert out.shape == inputs[0].shape
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


@every_layout
def test_xformers_bias_is_the_mask(make_layout):
    layout = make_layout()
    metadata = varlen.varlen_metadata(layout, R)
    expected = _expected_mask(layout)
    bias = varlen.block_diagonal_mask(metadata, *expected.shape)
    assert type(bias) is BlockDiagonalMask
    ends = (bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqstart_py)
    assert ends == ([0, expected.shape[0]], [0, expected.shape[1]])
    # What only the host could tell, and materialize wants.
    for part in (bias.q_seqinfo, bias.k_seqinfo):
        part.seqstart_py = part.seqstart.tolist()
    mask = bias.materialize(expected.shape) == 0
    assert torch.equal(_in_order(mask, metadata), expected)


every_adapter = pytest.mark.parametrize("name", ADAPTERS)


@pytest.fixture(autouse=True)
def _forget_imports(monkeypatch):
    yield
    monkeypatch.undo()
    varlen._import.cache_clear()


def _install(monkeypatch, libraries, capability=(9, 0)):
    """`libraries`: functions; None for what is not there."""
    varlen._import.cache_clear()
    for library, function in libraries.items():
        module, name, *_ = varlen._LIBRARIES[library]
        content = None
        if function is not None:
            content = types.ModuleType(module)
            setattr(content, name, function)
        monkeypatch.setitem(sys.modules, module, content)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def _real(library):
    """The library's own function, if it is installed."""
    return None if varlen._import(library) else varlen._function(library)


def _arguments(function):
    return set(inspect.signature(function).parameters)


@pytest.fixture
def adapter(name, monkeypatch):
    """The adapter, on a loop instead of its library; calls are checked against the latter's.

    Not against those of a library that is older than the loop: it is called otherwise.
    """
    function, library, substitute = ADAPTERS[name]
    real = _real(library)
    is_as_new = real is not None and _arguments(substitute) <= _arguments(real)

    @functools.wraps(substitute)
    def checked(*args, **kwargs):
        if is_as_new:
            inspect.signature(real).bind(*args, **kwargs)
        return substitute(*args, **kwargs)

    others = {"flash_attn_4": None} if library == "flash_attn" else {}
    _install(monkeypatch, {**others, library: checked})
    return function


def test_two_of_the_signatures_are_the_real_ones():
    real = _arguments(_real("varlen"))
    is_older = "enable_gqa" not in real
    assert _arguments(older_varlen_attn if is_older else ADAPTERS["varlen"][2]) <= real
    assert _arguments(ADAPTERS["xformers"][2]) <= _arguments(_real("xformers"))


def _out_and_gradients(function, inputs):
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, random_tensor(out.shape, out.dtype, seed=9))


def _check(adapter, layout, inputs):
    scale = 0.3
    got = _out_and_gradients(lambda q, k, v: adapter(q, k, v, layout, scale), inputs)
    expected = _out_and_gradients(
        lambda q, k, v: reference.masked_cross_attention(q, k, v, layout, "zero", "zero", scale),
        inputs,
    )
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    nothing = ~layout.attends()
    assert not got[0][nothing].any()
    assert not got[1][nothing].any()


@pytest.mark.parametrize(
    "layout_name",
    ["previous_0", "without_media", "seqlens", "next_seqlens", "any_order_seqlens", "decode"]
    + ["more_images_than_media", "packed", "decode_seqlens"],
)
@every_adapter
def test_adapters_agree_with_the_reference(adapter, layout_name):
    layout = LAYOUTS[layout_name]()
    _check(adapter, layout, make_inputs(layout))


@pytest.mark.parametrize("heads", [(3, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("layouts", [("transposed", "stepped"), ("padded", "sliced")], ids=str)
@every_adapter
def test_adapters_take_any_strides_and_heads(adapter, layouts, heads):
    layout = LAYOUTS["before_the_first"]()
    _check(adapter, layout, make_inputs(layout, *heads, layouts))


@every_adapter
def test_aligned_tensors_are_not_copied(adapter, monkeypatch):
    """k and v as halves of one projection, and gradients of q alone."""
    layout = LAYOUTS["before_the_first"]()
    q, _, _ = make_inputs(layout)
    projection = random_tensor((layout.media_total, R, 2, 4, 8), torch.float64, seed=1)
    k, v = projection.unbind(2)
    seen = []
    attend = varlen_cases.attend_by_sequences
    monkeypatch.setattr(
        varlen_cases,
        "attend_by_sequences",
        lambda *args: seen.append(args[1:3]) or attend(*args),
    )
    _out_and_gradients(lambda q: adapter(q, k, v, layout, 1.0), [q])
    assert [x.data_ptr() for x in seen[0]] == [k.data_ptr(), v.data_ptr()]


@every_adapter
def test_adapters_without_gradients(adapter):
    """xformers' own way of grouping heads then, under no_grad too where no tensor wants one."""
    layout = LAYOUTS["any_order_seqlens"]()
    inputs = make_inputs(layout)
    expected = reference.masked_cross_attention(*inputs, layout, "zero", "zero", 1.0)
    with torch.no_grad():
        for tensors in (inputs, [x.detach() for x in inputs]):
            out = adapter(*tensors, layout, 1.0)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_grid_that_ends_early_would_be_noticed(monkeypatch):
    """Of the substitutes: what no program writes is NaN."""
    layout = LAYOUTS["before_the_first"]()
    inputs = make_inputs(layout)
    metadata = varlen.varlen_metadata(layout, R)
    short = dataclasses.replace(metadata, max_seqlen_q=4)
    monkeypatch.setattr(varlen, "varlen_metadata", lambda *_: short)
    _install(monkeypatch, {"varlen": stand_in_of_varlen_attn})
    assert varlen.varlen_attention(*inputs, layout, 1.0).isnan().any()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_compile_takes_varlen_into_one_graph(kv_heads):
    """A GPU would have to run it."""
    if kv_heads == 2 and "enable_gqa" not in _arguments(_real("varlen")):
        pytest.skip("PyTorch 2.11's varlen_attn has no enable_gqa")
    layout = LAYOUTS["any_order_seqlens"]()
    q, k, v = (x.float() for x in make_inputs(layout, 4, kv_heads))
    nodes = []

    def backend(module, make_inputs):
        nodes.extend(node.target for node in module.graph.nodes)
        return lambda *_: (torch.zeros_like(q),)

    torch._dynamo.reset()
    compiled = torch.compile(varlen.varlen_attention, fullgraph=True, backend=backend)
    assert not compiled(q, k, v, layout, 1.0).any()
    assert torch.ops.torch_attn._varlen_attn in nodes


@pytest.mark.parametrize("activated", [None, "FA3", "FA4"])
def test_varlen_zeroes_rows_itself_under_fa4(activated, monkeypatch):
    """What its kernels leave where there are no keys is not known."""
    layout = LAYOUTS["before_the_first"]()
    substitute = functools.partial(attend_by_sequences, without_keys=torch.nan)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, enable_gqa, num_splits=None):
        return substitute(q, k, v, cu_q, cu_k, max_q, scale)

    _install(monkeypatch, {"varlen": varlen_attn})
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: activated)
    q, k, v = make_inputs(layout)
    out, dq, *_ = _out_and_gradients(
        lambda *inputs: varlen.varlen_attention(*inputs, layout, 1.0), [q, k, v]
    )
    for tensor in (out, dq):
        assert tensor.isnan().any() == (activated != "FA4")


@pytest.mark.parametrize(
    ("capability", "head_dim", "installed", "used"),
    [
        ((8, 0), 64, "both", "flash_attn"),
        ((9, 0), 256, "both", "flash_attn_4"),
        ((9, 0), 256, "flash_attn", "flash_attn"),
        ((10, 0), 128, "both", "flash_attn_4"),
        ((10, 0), 192, "both", "flash_attn"),
        ((10, 3), 256, "flash_attn_4", "flash_attn_4"),
        ((12, 0), 64, "both", "flash_attn"),
    ],
)
def test_flash_attn_4_is_taken_where_it_can_run(capability, head_dim, installed, used, monkeypatch):
    libraries = {
        name: ADAPTERS[name][2] if installed in (name, "both") else None
        for name in ("flash_attn", "flash_attn_4")
    }
    _install(monkeypatch, libraries, capability)
    assert varlen._flash_attn_library(torch.empty(1, 1, 1, head_dim)) == used


# Refusals.


def _why_not(impl="varlen", layout=None, dense=False, device="cuda", dtype=None, dim=64, heads=2):
    layout = LAYOUTS["before_the_first"]() if layout is None else layout
    with FakeTensorMode():
        options = {"device": device, "dtype": dtype or torch.bfloat16}
        q = torch.empty(*layout.media_start.shape, 4, dim, **options)
        k = torch.empty(layout.media_total, R, heads, dim, **options)
    return varlen.why_not(impl, q, k, layout, dense)


def _several():
    return make_previous([(1, 2)], 5, attend="all_previous")


@pytest.mark.parametrize("impl", ["varlen", "flash_attn", "xformers"])
@pytest.mark.parametrize(
    ("change", "capability", "message"),
    [
        ({"layout": _several}, (8, 0), "the layout has up to 2 media a token, "),
        ({"dense": True}, (8, 0), 'unattended="dense" has tokens that attend to several media'),
        ({"device": "cpu"}, (8, 0), "need a GPU and the tensors are on 'cpu'"),
        ({"dtype": torch.float32}, (8, 0), "torch.float16 and torch.bfloat16, got torch.float32"),
        ({"dtype": torch.float64}, (8, 0), "torch.float16 and torch.bfloat16, got torch.float64"),
        ({"dim": 264}, (8, 0), "head_dim up to 256 that is a multiple of 8, got 264"),
        ({"dim": 60}, (8, 0), "head_dim up to 256 that is a multiple of 8, got 60"),
        ({}, (7, 5), "need compute capability 8.0 or later, this GPU has (7, 5)"),
        ({}, (8, 0), None),
        ({"dim": 256, "dtype": torch.float16, "heads": 4}, (9, 0), None),
        ({"layout": LAYOUTS["any_order_seqlens"]}, (10, 0), None),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_why_not(change, capability, message, impl, monkeypatch):
    everything = {library: substitute for _, library, substitute in ADAPTERS.values()}
    _install(monkeypatch, everything, capability)
    change = {name: value() if callable(value) else value for name, value in change.items()}
    reason = _why_not(impl, **change)
    assert reason is None if message is None else message in reason


@pytest.mark.parametrize(
    ("impl", "missing", "words"),
    [
        ("varlen", "torch.nn.attention.varlen", [torch.__version__, "PyTorch 2.11 or later"]),
        (
            "flash_attn",
            "flash_attn",
            ["pip install flash-attn --no-build-isolation", "CUDA toolchain", "flash-attn-4"],
        ),
        ("xformers", "xformers.ops", ["pip install xformers"]),
    ],
)
def test_what_is_not_installed_is_refused_by_name(impl, missing, words, monkeypatch):
    libraries = {impl: None, **({"flash_attn_4": None} if impl == "flash_attn" else {})}
    _install(monkeypatch, libraries)
    reason = _why_not(impl)
    for word in (f"{missing} can't be imported (ModuleNotFoundError: ", *words):
        assert word in reason
    assert "\n" not in reason


class _Broken(types.ModuleType):
    def __getattr__(self, name):
        raise OSError("undefined symbol: _ZN3c10\n  in a long list of others")


def test_a_library_that_breaks_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", _Broken("xformers.ops"))
    _install(monkeypatch, {})
    expected = "xformers.ops can't be imported (OSError: undefined symbol: _ZN3c10): pip install"
    assert _why_not("xformers").startswith(expected)


def test_a_library_without_a_needed_argument_is_refused_by_name(monkeypatch):
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale):
        raise AssertionError

    _install(monkeypatch, dict.fromkeys(["flash_attn", "flash_attn_4"], flash_attn_varlen_func))
    expected = "flash_attn.flash_attn_varlen_func has no argument deterministic: pip install"
    assert _why_not("flash_attn").startswith(expected)


def test_older_pytorch_is_refused_grouped_heads_only(monkeypatch):
    _install(monkeypatch, {"varlen": older_varlen_attn})
    expected = "before PyTorch 2.12 it takes as many heads in k as in q, got 2 and 4"
    assert _why_not(heads=2) == expected
    assert _why_not(heads=4) is None
    layout = LAYOUTS["before_the_first"]()
    _check(varlen.varlen_attention, layout, make_inputs(layout, 4, 4))


def test_an_adapter_that_is_called_anyway_says_what_is_missing(monkeypatch):
    _install(monkeypatch, {"xformers": None})
    layout = LAYOUTS["before_the_first"]()
    with pytest.raises(RuntimeError, match="xformers.ops can't be imported"):
        varlen.xformers_attention(*make_inputs(layout), layout, 1.0)
