"""What masked_cross_attention promises beside the values, where tokens attend to several media."""

import functools

import pytest
import torch
from attention_cases import assert_bits_equal
from attention_contract import (
    BF16,
    check_built_without_host_sync,
    check_planted_sync,
    inputs_of,
    locations_at,
    peak_bytes,
    run_layout,
    run_on_meta,
    use_real_launchers,
    with_checkpoint,
)
from interpreter_cases import launches_of
from module_cases import saved_bytes
from several_media_cases import (
    COMBINE,
    DKV,
    DQ,
    FORWARD,
    LENGTHS,
    SETTINGS,
    Setting,
    all_previous_layout,
    every_impl,
    every_setting,
    holes_layout,
    make_mask,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import flamingo_fast as ff
from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops import several_media_attention
from flamingo_fast.testing.guard import guard
from flamingo_fast.testing.inputs import random_tensor

pytestmark = pytest.mark.matrix


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@every_impl
def test_compile_fullgraph_with_a_layout_given(impl, checkpointed, guarded):
    setting = SETTINGS["holes_dense"]

    def wrap(function):
        torch._dynamo.reset()
        attend = with_checkpoint(function) if checkpointed else function
        return torch.compile(attend, fullgraph=True, backend="aot_eager")

    assert_bits_equal(setting.run(impl, wrap=wrap), setting.run(impl))


@pytest.mark.parametrize("of_mask", [False, True], ids=["locations", "mask"])
@every_impl
def test_compile_fullgraph_with_a_layout_built_inside(impl, of_mask, guarded):
    locations, mask = locations_at(((2, 5), (0, 1, 9)), 12), make_mask()

    def make_layout():
        if of_mask:
            return MediaLayout.from_media_mask(mask, media_seqlens=LENGTHS)
        return MediaLayout.from_media_locations(locations, (2, 3), "all_previous")

    def wrap(function):
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def with_layout(q, k, v, _):
            return function(q, k, v, make_layout())

        return with_layout

    layout = make_layout()
    compiled = run_layout(layout, impl, wrap=wrap, unattended="uniform")
    assert_bits_equal(compiled, run_layout(layout, impl, unattended="uniform"))


@pytest.mark.parametrize(
    "frozen", [(), ("k", "v"), ("q",), ("q", "v")], ids=lambda names: "".join(names) or "none"
)
@every_setting
@every_impl
def test_fake_tensors_have_the_real_metadata(impl, setting, frozen):
    def run(inputs, layout):
        out = setting.call(impl, layout)(**inputs)
        wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
        return [out, *torch.autograd.grad(out, wanted, out.detach())]

    inputs, layout = setting.inputs(frozen=frozen), setting.make_layout()
    mode = FakeTensorMode()
    fake_inputs = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
    fake_layout = pytree.tree_map_only(torch.Tensor, mode.from_tensor, layout)
    with mode:
        fake = run(fake_inputs, fake_layout)
    for real_tensor, fake_tensor in zip(run(inputs, layout), fake, strict=True):
        assert fake_tensor.shape == real_tensor.shape
        assert fake_tensor.dtype == real_tensor.dtype
        assert fake_tensor.stride() == real_tensor.stride()


@every_impl
def test_gradients_of_halves_of_one_projection_are_halves_too(impl):
    layout = holes_layout()
    q, _, _ = inputs_of(layout, torch.float32).values()
    projected = random_tensor((10, 8, 2, 2, 16), seed=5)
    k, v = (half.requires_grad_() for half in projected.unbind(2))
    out = ff.masked_cross_attention(q, k, v, layout, impl=impl)
    dk, dv = torch.autograd.grad(out.square().sum(), (k, v))
    assert dk.stride() == k.stride() and dv.stride() == v.stride()
    assert dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()


@every_setting
@every_impl
def test_a_layout_serves_inference_mode_and_then_training(impl, setting, guarded):
    layout = setting.make_layout()
    with torch.inference_mode():
        served = setting.call(impl, layout)(**setting.inputs())
    trained = setting.run(impl, layout)
    assert torch.equal(served, trained["out"])
    assert_bits_equal(trained, setting.run(impl))


@every_setting
@every_impl
def test_activation_checkpointing(impl, setting, guarded):
    assert_bits_equal(setting.run(impl, wrap=with_checkpoint), setting.run(impl))


@every_impl
def test_double_backward_raises(impl):
    setting = SETTINGS["all_previous"]
    inputs = setting.inputs()
    out = setting.call(impl)(**inputs)
    for loss in (out.square().sum(), out.sum()):  # whose gradient needs one itself, and not
        (dq,) = torch.autograd.grad(loss, inputs["q"], create_graph=True)
        with pytest.raises(
            RuntimeError, match="masked_cross_attention: its gradients have no gradients"
        ):
            dq.sum().backward()


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@every_impl
def test_autocast_changes_no_bit(impl, dtype):
    """Neither of the forward, nor of a backward inside of it."""
    setting = SETTINGS["holes_dense"]
    plain = setting.run(impl, dtype=dtype)
    with torch.autocast("cpu", BF16):
        assert_bits_equal(setting.run(impl, dtype=dtype), plain)


@every_setting
def test_program_order_and_repetition_change_no_bit(setting):
    runs = []
    for seed in (0, 1, 1):
        with guard(shuffle_seed=seed):
            runs.append(setting.run("triton"))
    for run in runs[1:]:
        assert_bits_equal(run, runs[0])


@every_setting
def test_repetition_changes_no_bit_on_a_cpu(setting):
    assert_bits_equal(setting.run("torch"), setting.run("torch"))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@every_impl
def test_nor_on_how_many_media_others_have(impl, dtype, guarded):
    """A sample of one medium is alone as it is beside one of three."""
    locations = torch.zeros(2, 8, dtype=torch.bool)
    locations[0, 1] = locations[1, [0, 2, 5]] = True
    layouts = [
        MediaLayout.from_media_locations(locations, [1, 3], "all_previous"),
        MediaLayout.from_media_locations(locations[:1], [1], "all_previous"),
    ]
    inputs = inputs_of(layouts[0], dtype, num_keys=16)
    results = []
    for layout in layouts:
        sizes = {"q": layout.batch_size, "k": layout.media_total, "v": layout.media_total}
        leaves = [inputs[name][:size].detach().requires_grad_() for name, size in sizes.items()]
        out = ff.masked_cross_attention(*leaves, layout, impl=impl)
        gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
        names = ("out", "dq", "dk", "dv")
        results.append({name: x[:1] for name, x in zip(names, (out, *gradients), strict=True)})
    assert_bits_equal(*results)


def _masks_of_three_samples(num_keys: int) -> tuple[MediaLayout, list[MediaLayout]]:
    """Of 1, 6 and no media: together, where the widest decides, and each alone."""
    counts = [1, 6, 0]
    lengths = torch.tensor([num_keys, 3, num_keys, 0, 7, num_keys, num_keys - 1])
    mask = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    mask &= torch.arange(6) < torch.tensor(counts)[:, None, None]
    mask[:, 0] = False
    together = MediaLayout.from_media_mask(mask, num_media=counts, media_seqlens=lengths)
    alone = [
        MediaLayout.from_media_mask(
            mask[sample : sample + 1, :, :count], media_seqlens=lengths.split(counts)[sample]
        )
        for sample, count in enumerate(counts)
    ]
    return together, alone


@pytest.mark.parametrize("unattended", ["zero", "dense"])
@pytest.mark.parametrize(
    ("num_keys", "dtype"), [(8, BF16), (8, torch.float32), (64, BF16), (300, BF16)]
)
@every_impl
def test_a_sample_does_not_depend_on_the_batch(impl, num_keys, dtype, unattended, guarded):
    """Nor do its gradients. The keys of media of 300 tokens are split, those of one medium not."""
    together, alone = _masks_of_three_samples(num_keys)
    inputs = inputs_of(together, dtype, num_keys=num_keys)
    dout = random_tensor(tuple(inputs["q"].shape), dtype, seed=9)

    def run(layout, q, k, v, dout):
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        out = ff.masked_cross_attention(*leaves, layout, unattended=unattended, impl=impl)
        return [out, *torch.autograd.grad(out, leaves, dout, allow_unused=True)]

    everything = run(together, **inputs, dout=dout)
    for sample in range(2):
        row = slice(sample, sample + 1)
        media = slice(*together.cu_media[sample : sample + 2].tolist())
        of_sample = (row, row, media, media)
        q, k, v = inputs.values()
        one = run(alone[sample], q[row], k[media], v[media], dout[row])
        for tensor, expected, part in zip(everything, one, of_sample, strict=True):
            assert torch.equal(tensor[part], expected)
    assert not everything[0][2].any()
    combined = [launch for launch in guarded.launches if launch.kernel == COMBINE]
    assert len(combined) == (2 if impl == "triton" and num_keys == 300 else 0)


@pytest.mark.parametrize("num_tokens", [0, 1, 4])
@pytest.mark.parametrize("num_keys", [8, 300])
def test_last_tokens_are_those_of_the_whole_text(num_keys, num_tokens, guarded):
    """Where all have their keys split, or none."""
    together, _ = _masks_of_three_samples(num_keys)
    q, k, v = (tensor.detach() for tensor in inputs_of(together, num_keys=num_keys).values())
    attend = functools.partial(ff.masked_cross_attention, unattended="dense", impl="triton")
    last = attend(q[:, 5 - num_tokens :], k, v, together.last(num_tokens))
    assert torch.equal(last, attend(q, k, v, together)[:, 5 - num_tokens :])


def _launches(setting: Setting, frozen, backward: bool):
    """Of a bf16 forward, or its backward; q, k and v."""
    inputs = setting.inputs(frozen=frozen)
    return launches_of(setting.call("triton"), inputs, backward), inputs


@every_setting
def test_frozen_media_move_no_bytes_of_dk_and_dv(setting):
    launches, inputs = _launches(setting, ("k", "v"), backward=True)
    assert [launch.kernel for launch in launches] == [DQ]
    assert launches[0].bytes_stored == inputs["q"].nbytes


@pytest.mark.parametrize("frozen", [("q",), ("q", "k"), ("q", "v")], ids=lambda n: "".join(n))
def test_frozen_queries_move_no_bytes_of_dq(frozen):
    """The kernel of dq makes the row sums of dout * out, and nothing else."""
    launches, inputs = _launches(SETTINGS["holes_dense"], frozen, backward=True)
    assert [launch.kernel for launch in launches] == [DQ, DKV]
    assert launches[0].bytes_loaded == 2 * inputs["q"].nbytes
    assert launches[0].bytes_stored == 4 * inputs["q"].shape[:3].numel()
    assert launches[1].bytes_stored == 2 * inputs["k"].nbytes


@pytest.mark.parametrize("frozen", [("q",), ("k", "v")], ids=lambda n: "".join(n))
@every_setting
@every_impl
def test_frozen_inputs_change_no_other_gradient(impl, setting, frozen, guarded):
    everything, some = setting.run(impl), setting.run(impl, frozen=frozen)
    assert some.keys() == everything.keys() - {f"d{name}" for name in frozen}
    assert_bits_equal(some, {name: everything[name] for name in some})


@pytest.mark.parametrize("frozen", [(), ("q", "k", "v")], ids=["training", "inference"])
@every_setting
def test_the_log_sum_is_stored_for_a_backward_only(setting, frozen):
    launches, inputs = _launches(setting, frozen, backward=False)
    log_sums = 0 if frozen else 4 * inputs["q"].shape[:3].numel()
    assert launches[-1].bytes_stored == inputs["q"].nbytes + log_sums


@pytest.mark.parametrize("num_keys", [8, 64])
def test_only_media_that_are_attended_to_are_read(num_keys):
    """Nor padding: of five media one has no row, one no valid token, one is half empty."""
    mask = torch.tensor([[[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]]])
    lengths = torch.tensor([num_keys, num_keys, 0, num_keys, num_keys // 2])
    setting = Setting(lambda: MediaLayout.from_media_mask(mask, media_seqlens=lengths), num_keys)
    launches, inputs = _launches(setting, ("q", "k", "v"), backward=False)
    key_bytes = 2 * inputs["k"][0, 0].nbytes
    keys = int(lengths[[0, 3, 4]].sum())
    schedule = launches[0].bytes_loaded - inputs["q"].nbytes - keys * key_bytes
    assert 0 < schedule < key_bytes * num_keys // 2


@pytest.mark.parametrize("num_media", [2, 20])
@every_impl
def test_saved_for_backward(impl, num_media, guarded):
    """q, k, v, the layout, the output and a log-sum a row and head: nothing of L * N."""
    images = (tuple(range(0, 60, 60 // num_media)),)
    layout = all_previous_layout(images, (num_media,), seqlen=60)
    inputs = inputs_of(layout, num_keys=80 // num_media)
    others = saved_bytes(
        lambda: ff.masked_cross_attention(**inputs, layout=layout, impl=impl),
        [*inputs.values(), *pytree.tree_leaves(layout)],
    )
    assert sorted(others.values()) == [4 * 60 * 4, inputs["q"].nbytes]


def _all_previous_of_32_media() -> MediaLayout:
    """2048 tokens; image positions at random."""
    positions = torch.randperm(2048, generator=torch.Generator().manual_seed(0))[:32].tolist()
    return all_previous_layout((positions,), (32,), seqlen=2048)


def _image_of_four_tiles() -> MediaLayout:
    """As Mllama's at 560 pixels, of which the last tile is padding."""
    mask = torch.zeros(1, 3072, 1, 4, dtype=torch.bool)
    mask[:, 10:, :, :3] = True
    return MediaLayout.from_tile_mask(mask, 1601)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(
    ("make_layout", "num_keys", "head_dim"),
    [(_all_previous_of_32_media, 64, 64), (_image_of_four_tiles, 6404, 128)],
)
def test_the_torch_implementation_allocates_little(make_layout, num_keys, head_dim, dtype):
    """Twice the inputs, and a number of bytes: nothing of rows times keys.

    PyTorch's flash kernel copies keys and values in bf16.
    """
    layout = make_layout()
    q_shape, k_shape = (*layout.media_start.shape, 8, head_dim), (num_keys, 8, head_dim)
    q, k, v, dout = (
        random_tensor(shape, dtype, seed=seed, requires_grad=seed < 3)
        for seed, shape in enumerate(
            [q_shape, (layout.media_total, *k_shape), (layout.media_total, *k_shape), q_shape]
        )
    )
    attend = functools.partial(
        ff.masked_cross_attention, layout=layout, unattended="dense", impl="torch"
    )
    outputs = []
    forward = peak_bytes(lambda: outputs.append(attend(q, k, v)))
    backward = peak_bytes(lambda: torch.autograd.grad(outputs[0], (q, k, v), dout))
    scores = 4 * q[..., 0].numel() * layout.max_media * num_keys
    limit = 2 * (q.nbytes + k.nbytes + v.nbytes) + (24 << 20)
    assert limit < scores / 2
    assert q.nbytes <= forward <= limit
    assert q.nbytes + 2 * k.nbytes <= backward <= limit


LOCATIONS = torch.zeros(2, 300, dtype=torch.bool, device="meta")
COUNTS = torch.zeros(2, dtype=torch.int64, device="meta")
STARTS = torch.zeros(2, 300, dtype=torch.int64, device="meta")
MASK = torch.zeros(2, 300, 3, dtype=torch.bool, device="meta")
TILES = torch.zeros(2, 300, 3, 4, dtype=torch.int64, device="meta")
META_LENGTHS = torch.zeros(6, dtype=torch.int64, device="meta")
from_mask = functools.partial(MediaLayout.from_media_mask, MASK)

LAYOUTS_ON_META = {
    "all_previous": lambda: MediaLayout.from_media_locations(LOCATIONS, 3, "all_previous"),
    "intervals": lambda: MediaLayout.from_intervals(STARTS, STARTS, [2, 4], 3),
    "mask": from_mask,
    "one_hot_mask": lambda: from_mask(1),
    "mask_of_integers": lambda: MediaLayout.from_media_mask(MASK.long()),
    "mask_and_counts": lambda: from_mask(num_media=[3, 2]),
    "mask_and_counts_on_the_device": lambda: from_mask(num_media=COUNTS, media_total=6),
    "mask_and_media_seqlens": lambda: from_mask(media_seqlens=META_LENGTHS),
    "tile_mask": lambda: MediaLayout.from_tile_mask(TILES, 5),
    "packed": lambda: MediaLayout.packed(LOCATIONS, [0, 100, 300, 600], [2, 3, 1], "all_previous"),
    "packed_on_the_device": lambda: MediaLayout.packed(
        LOCATIONS, COUNTS, torch.zeros(1, dtype=torch.int64, device="meta"), media_total=6
    ),
    "last": lambda: from_mask().last(200),
    "cat_of_samples": lambda: MediaLayout.cat([from_mask(), LAYOUTS_ON_META["all_previous"]()]),
    "cat_of_text": lambda: MediaLayout.cat([from_mask(), from_mask().last(1)], dim=1),
    "cat_of_seqlens": lambda: MediaLayout.cat([from_mask(), from_mask(media_seqlens=META_LENGTHS)]),
    "to": lambda: holes_layout().to("meta"),
}


@pytest.mark.parametrize("make_layout", LAYOUTS_ON_META.values(), ids=LAYOUTS_ON_META.keys())
def test_layouts_are_built_without_a_host_sync(make_layout):
    check_built_without_host_sync(make_layout)


@pytest.fixture
def real_launchers(monkeypatch):
    use_real_launchers(monkeypatch, several_media_attention)


ON_META = [
    ("all_previous", {}),
    ("mask", {"unattended": "dense"}),
    ("mask_and_counts_on_the_device", {}),
    ("mask_and_media_seqlens", {"unattended": "dense", "num_keys": 200}),
    ("tile_mask", {"unattended": "dense", "past_last": "uniform", "num_keys": 20}),
    ("one_hot_mask", {"num_keys": 200}),
    ("packed", {}),
]


@pytest.mark.parametrize("frozen", [(), ("k", "v"), ("q",)], ids=lambda n: "".join(n) or "none")
@pytest.mark.parametrize(("name", "options"), ON_META, ids=str)
def test_real_launchers_make_no_host_sync(name, options, frozen, real_launchers):
    kernels = [FORWARD, DQ] if "k" in frozen else [FORWARD, DQ, DKV]
    launched = run_on_meta(LAYOUTS_ON_META[name](), frozen, impl="triton", **options)
    assert launched == kernels


def test_launchers_of_splits_make_no_host_sync(real_launchers):
    layout = LAYOUTS_ON_META["tile_mask"]().last(1)
    launched = run_on_meta(layout, impl="triton", unattended="dense", num_keys=6404)
    assert launched == [FORWARD, COMBINE, DQ, DKV]


@pytest.mark.parametrize("planted", ["_forward", "_backward"])
def test_a_host_sync_planted_in_a_launcher_is_noticed(planted, real_launchers, monkeypatch):
    check_planted_sync(monkeypatch, several_media_attention, planted, from_mask())
