"""The backends `varlen`, `flash_attn` and `xformers`: their metadata, adapters and refusals.

Their kernels need a GPU; here a loop over the sequences takes their place.
"""

import dataclasses
import functools
import inspect
import random
import sys
import types

import pytest
import torch
from test_attention_contract import _no_host_sync
from torch._subclasses.fake_tensor import FakeTensorMode
from xformers.ops.fmha.attn_bias import BlockDiagonalMask

import flamingo_fast as ff
from flamingo_fast import reference
from flamingo_fast.ops import varlen_attention as varlen
from flamingo_fast.testing.inputs import random_tensor

R = 3  # tokens of a medium


def _locations(images, seqlen: int) -> torch.Tensor:
    locations = torch.zeros(len(images), seqlen, dtype=torch.bool)
    for sample, positions in enumerate(images):
        locations[sample, list(positions)] = True
    return locations


def _layout(images, seqlen, num_media=None, seqlens=None, attend="previous"):
    return ff.MediaLayout.from_media_locations(
        _locations(images, seqlen),
        list(map(len, images)) if num_media is None else num_media,
        attend,
        media_seqlens=None if seqlens is None else torch.tensor(seqlens),
    )


def _random(attend: str, seed: int):
    generator = random.Random(seed)
    images = [sorted(generator.sample(range(50), generator.randrange(7))) for _ in range(4)]
    return _layout(images, 50, attend=attend)


def _shuffled(seqlens=None):
    """One medium, or none, for each token, in any order; the rows of a medium are scattered."""
    start = torch.tensor([[2, 0, 2, 1, 0, 2, 2], [0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 1]])
    attends = torch.tensor([[1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1, 1]])
    return ff.MediaLayout.from_intervals(
        start,
        start + attends,
        [3, 0, 2],
        1,
        media_seqlens=None if seqlens is None else torch.tensor(seqlens),
    )


def _packed():
    """Two rows of several documents, the third of them without media; padding after the last."""
    return ff.MediaLayout.packed(
        _locations([(1, 4, 9, 20), (0, 7)], 24), [0, 8, 12, 19, 24, 30, 40], [2, 1, 0, 1, 1, 1]
    )


LAYOUTS = {
    **{f"previous_{seed}": functools.partial(_random, "previous", seed) for seed in range(3)},
    **{f"next_{seed}": functools.partial(_random, "next", seed) for seed in range(3)},
    "before_the_first": lambda: _layout([(4, 8), (11,)], 12),
    "without_media": lambda: _layout([(), (2, 5), (), (), (0,), ()], 7),
    "nothing_at_all": lambda: _layout([(), ()], 5),
    "more_images_than_media": lambda: _layout([(1, 3, 6), (0, 2, 4)], 8, [1, 2]),
    "more_media_than_images": lambda: _layout([(3,), ()], 6, [4, 2]),
    "seqlens": lambda: _layout([(1, 3), (0, 4, 5)], 9, seqlens=[0, 3, 1, 0, 2]),
    "next_seqlens": lambda: _layout([(1, 3), (0, 4)], 9, seqlens=[3, 0, 0, 1], attend="next"),
    "any_order": _shuffled,
    "any_order_seqlens": lambda: _shuffled([1, 0, 3, 0, 2]),
    "mask": lambda: ff.MediaLayout.from_media_mask(torch.eye(4)[None, [3, 1, 1, 0]].bool(), 1),
    "decode": lambda: _layout([(2, 5), (), (0,)], 9).last(1),
    "decode_seqlens": lambda: _layout([(2, 5), (8,)], 9, seqlens=[2, 0, 1]).last(1),
    "long_rows": lambda: _layout([range(0, 900, 90), (5,)], 1000),
    "packed": _packed,
}
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
    layout = _shuffled()
    assert varlen.varlen_metadata(layout, R).row_index is layout.row_index is not None
    assert varlen.varlen_metadata(_random("next", 0), R).row_index is None


def test_the_rows_of_a_long_run_without_media_are_cut():
    """The kernels' grids end at max_seqlen_q."""
    for layout in (
        _layout([()] * 5 + [(3,)] + [()] * 5, 8),
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
    inputs = [x.detach().to("meta").requires_grad_() for x in _inputs(layout)]

    @functools.wraps(ADAPTERS[library][2])
    def attend(q, k, v, *_args, **_kwargs):
        return q + k.sum() + v.sum()

    others = {"flash_attn_4": None} if library == "flash_attn" else {}
    _install(monkeypatch, {**others, library: attend})
    with _no_host_sync():
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


# What takes the place of the libraries.


def _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, scale, without_keys):
    """Attention for each sequence; `without_keys` times q where it has none.

    Rows that the kernels' grid would not reach are NaN.
    """
    for tensor in (q, k, v):
        assert tensor.stride(-1) == 1
        assert not any(x % 8 for x in (*tensor.stride()[:-1], tensor.storage_offset()))
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    outs = []
    sequences = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    lengths = list(zip(*sequences, strict=True))
    for rows, keys, values in zip(
        q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True
    ):
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", rows, keys) * scale, -1)
        out = torch.einsum("hqk,khd->qhd", weights, values)
        if len(keys) == 0:
            out = rows * without_keys
        outs.append(torch.where(torch.arange(len(rows))[:, None, None] < longest, out, torch.nan))
    return torch.cat(outs)


def _check_decoding(q, k, longest):
    """With grouped heads FlashAttention 2 takes a max_seqlen_q of 1 for a row in each sequence."""
    assert longest > 1 or q.shape[1] == k.shape[1]


def _varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    enable_gqa=False,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert (max_k, num_splits) == (R, 1)
    _check_decoding(query, key, max_q)
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, scale, 0)


def _flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert max_seqlen_k == R
    assert deterministic
    _check_decoding(q, k, max_seqlen_q)
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, 0)


def _flash_attn_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    num_splits=0,
    deterministic=False,
):
    assert (max_seqlen_k, num_splits, deterministic) == (R, 1, True)
    out = _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, torch.nan)
    return out, None


def _memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1
    assert query.shape[2:] == key.shape[2:] == value.shape[2:]
    if query.dim() == 5:
        assert not any(x.requires_grad for x in (query, key, value))
        assert key.stride(3) == value.stride(3) == 0
        key, value = key[..., 0, :], value[..., 0, :]
    parts = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    assert parts[1].max_seqlen == R
    out = _attend(
        query[0].reshape(query.shape[1], -1, query.shape[-1]),
        key[0],
        value[0],
        *(part.seqstart for part in parts),
        parts[0].max_seqlen,
        scale,
        torch.nan,
    )
    return out.view(query.shape)


ADAPTERS = {
    "varlen": (varlen.varlen_attention, "varlen", _varlen_attn),
    "flash_attn": (varlen.flash_attn_attention, "flash_attn", _flash_attn_2),
    "flash_attn_4": (varlen.flash_attn_attention, "flash_attn_4", _flash_attn_4),
    "xformers": (varlen.xformers_attention, "xformers", _memory_efficient_attention),
}
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


@pytest.fixture
def adapter(name, monkeypatch):
    """The adapter, on a loop instead of its library; calls are checked against the latter's."""
    function, library, substitute = ADAPTERS[name]
    real = _real(library)

    @functools.wraps(substitute)
    def checked(*args, **kwargs):
        if real is not None:
            inspect.signature(real).bind(*args, **kwargs)
        return substitute(*args, **kwargs)

    others = {"flash_attn_4": None} if library == "flash_attn" else {}
    _install(monkeypatch, {**others, library: checked})
    return function


def test_two_of_the_signatures_are_the_real_ones():
    for library in ("varlen", "xformers"):
        parameters = inspect.signature(_real(library)).parameters
        assert set(inspect.signature(ADAPTERS[library][2]).parameters) <= set(parameters)


def _inputs(layout, heads=4, kv_heads=2, layouts=("contiguous", "contiguous")):
    shapes = {
        "q": (*layout.media_start.shape, heads, 8),
        "k": (layout.media_total, R, kv_heads, 8),
        "v": (layout.media_total, R, kv_heads, 8),
    }
    return [
        random_tensor(shape, torch.float64, seed=seed, layout=layouts[name != "q"]).requires_grad_()
        for seed, (name, shape) in enumerate(shapes.items())
    ]


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
    _check(adapter, layout, _inputs(layout))


@pytest.mark.parametrize("heads", [(3, 3), (6, 1)], ids=str)
@pytest.mark.parametrize("layouts", [("transposed", "stepped"), ("padded", "sliced")], ids=str)
@every_adapter
def test_adapters_take_any_strides_and_heads(adapter, layouts, heads):
    layout = LAYOUTS["before_the_first"]()
    _check(adapter, layout, _inputs(layout, *heads, layouts))


@every_adapter
def test_aligned_tensors_are_not_copied(adapter, monkeypatch):
    """k and v as halves of one projection, and gradients of q alone."""
    layout = LAYOUTS["before_the_first"]()
    q, _, _ = _inputs(layout)
    projection = random_tensor((layout.media_total, R, 2, 4, 8), torch.float64, seed=1)
    k, v = projection.unbind(2)
    seen = []
    attend = globals()["_attend"]
    monkeypatch.setitem(globals(), "_attend", lambda *args: seen.append(args[1:3]) or attend(*args))
    _out_and_gradients(lambda q: adapter(q, k, v, layout, 1.0), [q])
    assert [x.data_ptr() for x in seen[0]] == [k.data_ptr(), v.data_ptr()]


@every_adapter
def test_adapters_without_gradients(adapter):
    """xformers' own way of grouping heads then, under no_grad too where no tensor wants one."""
    layout = LAYOUTS["any_order_seqlens"]()
    inputs = _inputs(layout)
    expected = reference.masked_cross_attention(*inputs, layout, "zero", "zero", 1.0)
    with torch.no_grad():
        for tensors in (inputs, [x.detach() for x in inputs]):
            out = adapter(*tensors, layout, 1.0)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_grid_that_ends_early_would_be_noticed(monkeypatch):
    """Of the substitutes: what no program writes is NaN."""
    layout = LAYOUTS["before_the_first"]()
    inputs = _inputs(layout)
    metadata = varlen.varlen_metadata(layout, R)
    short = dataclasses.replace(metadata, max_seqlen_q=4)
    monkeypatch.setattr(varlen, "varlen_metadata", lambda *_: short)
    _install(monkeypatch, {"varlen": _varlen_attn})
    assert varlen.varlen_attention(*inputs, layout, 1.0).isnan().any()


def test_compile_takes_varlen_into_one_graph():
    """A GPU would have to run it."""
    layout = LAYOUTS["any_order_seqlens"]()
    q, k, v = (x.float() for x in _inputs(layout))
    nodes = []

    def backend(module, _inputs):
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
    substitute = functools.partial(_attend, without_keys=torch.nan)

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, enable_gqa, num_splits=None):
        return substitute(q, k, v, cu_q, cu_k, max_q, scale)

    _install(monkeypatch, {"varlen": varlen_attn})
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: activated)
    q, k, v = _inputs(layout)
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
    return _layout([(1, 2)], 5, attend="all_previous")


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
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        assert (max_q, max_k) == (12, R)
        return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, scale, 0)

    _install(monkeypatch, {"varlen": varlen_attn})
    expected = "before PyTorch 2.12 it takes as many heads in k as in q, got 2 and 4"
    assert _why_not(heads=2) == expected
    assert _why_not(heads=4) is None
    layout = LAYOUTS["before_the_first"]()
    _check(varlen.varlen_attention, layout, _inputs(layout, 4, 4))


def test_an_adapter_that_is_called_anyway_says_what_is_missing(monkeypatch):
    _install(monkeypatch, {"xformers": None})
    layout = LAYOUTS["before_the_first"]()
    with pytest.raises(RuntimeError, match="xformers.ops can't be imported"):
        varlen.xformers_attention(*_inputs(layout), layout, 1.0)
