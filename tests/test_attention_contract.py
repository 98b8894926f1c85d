"""What masked_cross_attention and MediaLayout promise beside the values."""

import copy
import functools
import pickle

import pytest
import torch
import torch._inductor.config
from attention_cases import assert_bits_equal
from attention_contract import (
    BF16,
    HostSyncError,
    check_built_without_host_sync,
    check_planted_sync,
    inputs_of,
    locations_at,
    no_host_sync,
    peak_bytes,
    previous_layout,
    run_layout,
    run_on_meta,
    use_real_launchers,
    with_checkpoint,
)
from interpreter_cases import launches_of
from module_cases import saved_bytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.utils import _apply_to_tensors, _to_kwargs
from torch.utils import _pytree as pytree
from torch.utils.data._utils.pin_memory import pin_memory

import flamingo_fast as ff
from flamingo_fast.bench.registry import Unavailable, require_cpp
from flamingo_fast.layout import ATTEND
from flamingo_fast.ops import one_medium_attention
from flamingo_fast.testing.compare import outputs_and_gradients
from flamingo_fast.testing.guard import guard
from flamingo_fast.testing.inputs import random_tensor

pytestmark = pytest.mark.matrix

every_impl = pytest.mark.parametrize("impl", ["torch", "triton"])
frozen_or_not = pytest.mark.parametrize(
    "frozen", [(), ("k", "v"), ("q",), ("q", "v")], ids=lambda names: "".join(names) or "none"
)


def _with_seqlens() -> ff.MediaLayout:
    return previous_layout(media_seqlens=torch.tensor([5, 8, 0, 3]))


def _split() -> ff.MediaLayout:
    """Both media have more rows than a work item takes."""
    layout = previous_layout(images=((3, 171),), seqlen=340)
    assert (layout.split_media[:, 0] >= 0).all()
    return layout


LAYOUTS = {"whole": previous_layout, "media_seqlens": _with_seqlens, "split": _split}
every_layout = pytest.mark.parametrize("make_layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.mark.parametrize("layout_inside", [False, True], ids=["layout_given", "layout_built"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@every_impl
def test_compile_fullgraph(impl, checkpointed, layout_inside, guarded):
    layout = _with_seqlens()
    locations = locations_at()

    def wrap(function):
        attend = with_checkpoint(function) if checkpointed else function

        def with_layout(q, k, v, layout):
            if layout_inside:
                layout = ff.MediaLayout.from_media_locations(
                    locations, 2, media_seqlens=layout.media_seqlens
                )
            return attend(q, k, v, layout)

        torch._dynamo.reset()
        return torch.compile(with_layout, fullgraph=True, backend="aot_eager")

    compiled = run_layout(layout, impl, wrap=wrap, past_last="uniform")
    assert_bits_equal(compiled, run_layout(layout, impl, past_last="uniform"))


def test_compile_with_inductor():
    try:
        require_cpp()
    except Unavailable as reason:
        pytest.skip(f"needs apt package g++ or python3-dev: {reason}")

    locations = locations_at()

    def function(q, k, v):
        layout = ff.MediaLayout.from_media_locations(locations, 2)
        return torch.relu(ff.masked_cross_attention(q, k, v, layout, impl="triton"))

    inputs = inputs_of(previous_layout(), torch.float32)
    run = functools.partial(
        outputs_and_gradients,
        inputs=inputs,
        output_names=("out",),
        output_gradients=[random_tensor(tuple(inputs["q"].shape), torch.float64, seed=9)],
    )
    torch._dynamo.reset()
    # Precompiling headers takes an openssl program, which fails now and then.
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        compiled = run(torch.compile(function, fullgraph=True))
    eager = run(function)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-5, msg=name)


@frozen_or_not
@every_layout
@pytest.mark.parametrize("impl", ["torch", "triton", "sdpa"])
def test_fake_tensors_have_the_real_metadata(impl, make_layout, frozen):
    layout = make_layout()

    def run(inputs, layout):
        out = ff.masked_cross_attention(**inputs, layout=layout, impl=impl)
        gradients = torch.autograd.grad(
            out, [tensor for tensor in inputs.values() if tensor.requires_grad], out.detach()
        )
        return [out, *gradients]

    real = run(inputs_of(layout, frozen=frozen), layout)
    mode = FakeTensorMode()
    fake_inputs = {
        name: mode.from_tensor(tensor) for name, tensor in inputs_of(layout, frozen=frozen).items()
    }
    fake_layout = pytree.tree_map_only(torch.Tensor, mode.from_tensor, layout)
    with mode:
        fake = run(fake_inputs, fake_layout)
    for real_tensor, fake_tensor in zip(real, fake, strict=True):
        assert fake_tensor.shape == real_tensor.shape
        assert fake_tensor.dtype == real_tensor.dtype
        assert fake_tensor.stride() == real_tensor.stride()


def test_gradients_of_halves_of_one_projection_are_halves_too():
    """Halves of one memory, in the projection's order."""
    layout = previous_layout()
    q, _, _ = inputs_of(layout, torch.float32).values()
    projected = random_tensor((4, 8, 2, 2, 16), seed=5)
    k, v = (half.requires_grad_() for half in projected.unbind(2))
    for impl in ("torch", "triton"):
        out = ff.masked_cross_attention(q, k, v, layout, impl=impl)
        dk, dv = torch.autograd.grad(out.square().sum(), (k, v))
        assert dk.stride() == k.stride() and dv.stride() == v.stride()
        assert dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()


@every_impl
def test_a_layout_serves_inference_mode_and_then_training(impl, guarded):
    layout, fresh = _with_seqlens(), _with_seqlens()
    with torch.inference_mode():
        served = ff.masked_cross_attention(
            **inputs_of(layout), layout=layout, past_last="uniform", impl=impl
        )
    trained = run_layout(layout, impl, past_last="uniform")
    assert torch.equal(served, trained["out"])
    assert_bits_equal(trained, run_layout(fresh, impl, past_last="uniform"))


@every_layout
@every_impl
def test_activation_checkpointing(impl, make_layout, guarded):
    layout = make_layout()
    assert_bits_equal(run_layout(layout, impl, wrap=with_checkpoint), run_layout(layout, impl))


@every_impl
def test_double_backward_raises(impl):
    layout = previous_layout()
    inputs = inputs_of(layout)
    out = ff.masked_cross_attention(**inputs, layout=layout, impl=impl)
    for loss in (out.square().sum(), out.sum()):  # whose gradient needs one itself, and not
        (dq,) = torch.autograd.grad(loss, inputs["q"], create_graph=True)
        with pytest.raises(
            RuntimeError, match="masked_cross_attention: its gradients have no gradients"
        ):
            dq.sum().backward()


@pytest.mark.parametrize("choice", ["zero", "uniform"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@every_impl
def test_autocast_changes_no_bit(impl, dtype, choice):
    def wrap(function):
        def under_autocast(*arguments):
            with torch.autocast("cpu", BF16):
                return function(*arguments)

        return under_autocast

    run = functools.partial(
        run_layout, previous_layout(), impl, dtype, unattended=choice, past_last=choice
    )
    assert_bits_equal(run(wrap=wrap), run())


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_autocast_keeps_the_dtype_of_other_implementations(impl):
    layout = previous_layout()
    inputs = inputs_of(layout, torch.float32)
    with torch.autocast("cpu", BF16):
        out = ff.masked_cross_attention(**inputs, layout=layout, impl=impl)
    assert out.dtype == torch.float32
    expected = ff.masked_cross_attention(**inputs, layout=layout, impl=impl)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=3e-2)


@every_layout
def test_program_order_and_repetition_change_no_bit(make_layout):
    layout = make_layout()
    runs = []
    for seed in (0, 1, 2, 2):
        with guard(shuffle_seed=seed):
            runs.append(run_layout(layout, "triton", past_last="uniform"))
    for run in runs[1:]:
        assert_bits_equal(run, runs[0])


@every_layout
def test_repetition_changes_no_bit_on_a_cpu(make_layout):
    layout = make_layout()
    assert_bits_equal(run_layout(layout, "torch"), run_layout(layout, "torch"))


BATCH = ((4,), (1, 9, 10, 20, 33))


@every_impl
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("sample", [0, 1])
def test_a_sample_does_not_depend_on_the_batch(sample, dtype, impl, guarded):
    counts = [len(positions) for positions in BATCH]
    together = previous_layout(counts, images=BATCH, seqlen=40)
    alone = previous_layout(counts[sample], images=BATCH[sample : sample + 1], seqlen=40)
    q, k, v = (tensor.detach().to(dtype) for tensor in inputs_of(together).values())
    media = slice(sum(counts[:sample]), sum(counts[: sample + 1]))
    everything = ff.masked_cross_attention(q, k, v, together, impl=impl)
    one = ff.masked_cross_attention(q[sample : sample + 1], k[media], v[media], alone, impl=impl)
    assert torch.equal(everything[sample : sample + 1], one)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_last_tokens_are_those_of_the_whole_text(num_tokens, guarded):
    layout = previous_layout([1, 5], images=BATCH, seqlen=40)
    q, k, v = (tensor.detach() for tensor in inputs_of(layout).values())
    whole = ff.masked_cross_attention(q, k, v, layout, impl="triton")
    first = 40 - num_tokens
    last = ff.masked_cross_attention(q[:, first:], k, v, layout.last(num_tokens), impl="triton")
    assert torch.equal(whole[:, first:], last)


def _launches(layout, frozen, backward: bool):
    """Of a bf16 forward, or its backward; q, k and v."""
    inputs = inputs_of(layout, frozen=frozen)
    attend = functools.partial(ff.masked_cross_attention, layout=layout, impl="triton")
    return launches_of(attend, inputs, backward), inputs


def _item_and_kv_bytes(layout, k: torch.Tensor) -> int:
    """A program reads its item and, if that has a medium, the medium's keys and values."""
    items = len(layout.work_items)
    with_medium = int((layout.work_items[:, 0] >= 0).sum())
    kv_heads, medium_head_bytes = k.shape[2], k.shape[1] * k.shape[3] * 2
    return kv_heads * (items * 16 + with_medium * 2 * medium_head_bytes)


@pytest.mark.parametrize("make_layout", [previous_layout, _split], ids=["whole", "split"])
def test_frozen_media_move_no_bytes_of_dk_and_dv(make_layout):
    layout = make_layout()
    launches, inputs = _launches(layout, ("k", "v"), backward=True)
    assert [launch.kernel for launch in launches] == ["_one_medium_bwd_kernel"]
    assert launches[0].bytes_stored == inputs["q"].nbytes
    # Rows of q and dout, and a log-sum.
    row_bytes = 4 * (2 * 16 * 2 + 4)
    rows = int(layout.attends().sum())
    assert launches[0].bytes_loaded == rows * row_bytes + _item_and_kv_bytes(layout, inputs["k"])


@pytest.mark.parametrize("frozen", [("q",), ("q", "k"), ("q", "v")], ids=lambda n: "".join(n))
def test_frozen_queries_move_no_bytes_of_dq(frozen):
    launches, inputs = _launches(previous_layout(), frozen, backward=True)
    assert [launch.kernel for launch in launches] == ["_one_medium_bwd_kernel"]
    assert launches[0].bytes_stored == 2 * inputs["k"].nbytes


@pytest.mark.parametrize("frozen", [("q",), ("k", "v")], ids=lambda n: "".join(n))
@every_layout
@every_impl
def test_frozen_inputs_change_no_other_gradient(impl, make_layout, frozen, guarded):
    layout = make_layout()
    everything, some = run_layout(layout, impl), run_layout(layout, impl, frozen=frozen)
    assert some.keys() == everything.keys() - {f"d{name}" for name in frozen}
    assert_bits_equal(some, {name: everything[name] for name in some})


@pytest.mark.parametrize("frozen", [(), ("q", "k", "v")], ids=["training", "inference"])
def test_the_log_sum_is_stored_for_a_backward_only(frozen):
    layout = previous_layout()
    launches, inputs = _launches(layout, frozen, backward=False)
    log_sums = 0 if frozen else 4 * inputs["q"].shape[:3].numel()
    assert launches[0].bytes_stored == inputs["q"].nbytes + log_sums


@pytest.mark.parametrize("num_media", [2, 20])
@every_impl
def test_saved_for_backward(impl, num_media, guarded):
    """q, k, v, the layout and a log-sum a row and head: nothing of L * N."""
    images = (tuple(range(0, 60, 60 // num_media)),)
    layout = previous_layout(num_media, images=images, seqlen=60)
    inputs = inputs_of(layout, num_keys=80 // num_media)
    others = saved_bytes(
        lambda: ff.masked_cross_attention(**inputs, layout=layout, impl=impl),
        [*inputs.values(), *pytree.tree_leaves(layout)],
    )
    assert list(others.values()) == ([4 * 60 * 4] if impl == "triton" else [])


META = torch.zeros(4, device="meta")
META_MASK = META > 0


@pytest.mark.parametrize(
    "synchronise",
    [
        META.sum().item,
        META.tolist,
        META.cpu,
        META.nonzero,
        META.unique,
        lambda: float(META[0]),
        lambda: bool(META_MASK.any()),
        lambda: META[META_MASK],
        lambda: META.clone().index_put_((META_MASK,), META[0]),
        lambda: META.masked_select(META_MASK),
        lambda: torch.equal(META, META),
        lambda: torch.zeros(4).copy_(META),
        lambda: torch.zeros(4).to("meta"),
        lambda: META.clone().copy_(torch.zeros(4)),
        lambda: torch.tensor([1, 2], device="meta"),
    ],
)
def test_host_syncs_are_noticed(synchronise):
    with no_host_sync(), pytest.raises(HostSyncError):
        synchronise()


LOCATIONS = torch.zeros(2, 300, dtype=torch.bool, device="meta")
COUNTS = torch.zeros(2, dtype=torch.int64, device="meta")
STARTS = torch.zeros(2, 300, dtype=torch.int64, device="meta")
LENGTHS = torch.zeros(6, dtype=torch.int64, device="meta")
from_locations = functools.partial(ff.MediaLayout.from_media_locations, LOCATIONS)

LAYOUTS_ON_META = {
    **{attend: functools.partial(from_locations, 3, attend) for attend in ATTEND},
    "counts": lambda: from_locations([2, 4]),
    "counts_in_a_tensor": lambda: from_locations(torch.tensor([2, 4])),
    "counts_on_the_device": lambda: from_locations(COUNTS, media_total=6),
    "media_seqlens": lambda: from_locations(3, media_seqlens=LENGTHS),
    "from_intervals": lambda: ff.MediaLayout.from_intervals(STARTS, STARTS, 3, 1),
    "last": lambda: from_locations(3).last(200),
    "cat_of_samples": lambda: ff.MediaLayout.cat([from_locations(2), from_locations(1)]),
    "cat_of_text": lambda: ff.MediaLayout.cat([from_locations(3), from_locations(3)], dim=1),
    "to": lambda: previous_layout(images=((2, 5), (1, 9)), seqlen=300).to("meta"),
    "to_with_media_seqlens": lambda: _with_seqlens().to("meta"),
}


@pytest.mark.parametrize("make_layout", LAYOUTS_ON_META.values(), ids=LAYOUTS_ON_META.keys())
def test_layouts_are_built_without_a_host_sync(make_layout):
    check_built_without_host_sync(make_layout)


@pytest.fixture
def real_launchers(monkeypatch):
    use_real_launchers(monkeypatch, one_medium_attention)


@pytest.mark.parametrize("frozen", [(), ("k", "v"), ("q",)], ids=lambda n: "".join(n) or "none")
@pytest.mark.parametrize("name", ["previous", "next", "media_seqlens", "counts_on_the_device"])
def test_real_launchers_make_no_host_sync(name, frozen, real_launchers):
    kernels = ["_one_medium_fwd_kernel", "_one_medium_bwd_kernel"]
    if "k" not in frozen:
        kernels.append("_sum_split_media_kernel")
    assert run_on_meta(LAYOUTS_ON_META[name](), frozen, impl="triton") == kernels


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("previous", {"impl": "triton", "unattended": "uniform"}),
        ("media_seqlens", {"impl": "triton", "past_last": "uniform"}),
        ("previous", {"impl": "sdpa"}),
        ("all_previous", {"impl": "sdpa", "unattended": "dense"}),
        ("media_seqlens", {"impl": "sdpa", "unattended": "dense"}),
        ("counts_on_the_device", {"impl": "sdpa", "past_last": "uniform"}),
        ("previous", {"impl": "torch"}),
        ("media_seqlens", {"impl": "reference", "unattended": "dense"}),
    ],
    ids=str,
)
def test_the_torch_side_makes_no_host_sync(name, options, real_launchers):
    launched = run_on_meta(LAYOUTS_ON_META[name](), **options)
    assert bool(launched) == (options["impl"] == "triton")


@pytest.mark.parametrize("planted", ["_forward", "_backward"])
def test_a_host_sync_planted_in_a_launcher_is_noticed(planted, real_launchers, monkeypatch):
    check_planted_sync(monkeypatch, one_medium_attention, planted, from_locations(3))


def test_peak_bytes_counts_what_is_alive_at_once():
    def function():
        for _ in range(3):
            temporary = torch.empty(1 << 20, dtype=torch.uint8)
            del temporary
        return torch.empty(1 << 10, dtype=torch.uint8)

    assert 1 << 20 <= peak_bytes(function) < (1 << 20) + (1 << 14)


@every_layout
def test_the_torch_implementation_is_one_node(make_layout):
    layout = make_layout()
    out = ff.masked_cross_attention(**inputs_of(layout), layout=layout, impl="torch")
    before = [type(node).__name__ for node, _ in out.grad_fn.next_functions if node is not None]
    assert before == ["AccumulateGrad"] * 3


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("batch", "seqlen", "media"), [(1, 2048, 32), (4, 256, 5)])
def test_the_torch_implementation_allocates_little(batch, seqlen, media, dtype):
    """At most twice q at once, the results included but for dk and dv, which have k's size."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randperm(seqlen, generator=generator)[:media].tolist() for _ in range(batch)]
    layout = previous_layout(media, images=images, seqlen=seqlen)
    q_shape, k_shape = (batch, seqlen, 8, 64), (batch * media, 64, 8, 64)
    q, k, v, dout = (
        random_tensor(shape, dtype, seed=seed, requires_grad=seed < 3)
        for seed, shape in enumerate([q_shape, k_shape, k_shape, q_shape])
    )
    outputs = []
    forward = peak_bytes(
        lambda: outputs.append(ff.masked_cross_attention(q, k, v, layout, impl="torch"))
    )
    backward = peak_bytes(lambda: torch.autograd.grad(outputs[0], (q, k, v), dout))
    assert q.nbytes <= forward <= 2 * q.nbytes
    assert q.nbytes <= backward - k.nbytes - v.nbytes <= 2 * q.nbytes


@pytest.mark.parametrize("frozen", [(), ("k", "v")], ids=["", "frozen_kv"])
def test_decoding_reads_the_keys_of_one_medium(frozen):
    """Of nine media the last token attends to one: the others are not read."""
    layout = previous_layout(9, images=(tuple(range(9)), tuple(range(9))), seqlen=12).last(1)
    for backward in (False, True):
        launches, inputs = _launches(layout, frozen, backward)
        medium_bytes = 2 * inputs["k"].nbytes // 18
        loaded = launches[0].bytes_loaded
        rows = (2 if backward else 1) * inputs["q"].nbytes + 4 * inputs["q"][..., 0].numel()
        schedule = 16 * len(layout.work_items) * inputs["k"].shape[2]
        assert 2 * medium_bytes < loaded <= 2 * medium_bytes + rows + schedule


def test_layouts_built_in_compiled_code_of_many_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def build(locations):
        return ff.MediaLayout.from_media_locations(locations, 2)

    torch.compiler.reset()
    for seqlen in (12, 13, 200, 333, 700, 1999):
        locations = torch.arange(seqlen)[None] % 7 == 3
        assert build(locations) == ff.MediaLayout.from_media_locations(locations, 2)
    # One for the first length, one for any; where a medium may be split, or two, it is another.
    assert len(graphs) <= 4


MOVES = {
    "tree_map": lambda layout: pytree.tree_map(lambda leaf: leaf, layout),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layout: pickle.loads(pickle.dumps(layout)),
    "pin_memory": pin_memory,
    "to": lambda layout: layout.to("cpu"),
    "fsdp": functools.partial(_apply_to_tensors, torch.clone),
    "ddp": lambda layout: _to_kwargs((layout,), {}, torch.device("cpu"), False)[0][0][0],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@every_layout
def test_layouts_survive_what_wrappers_do_to_inputs(make_layout, move):
    layout = make_layout()
    moved = move(layout)
    assert isinstance(moved, ff.MediaLayout)
    assert moved == layout
    assert_bits_equal(run_layout(moved, "torch"), run_layout(layout, "torch"))


@pytest.mark.parametrize("make_layout", [previous_layout, _with_seqlens])
def test_leaves_of_a_layout_are_its_tensors(make_layout):
    """A function of tensors can be mapped over it, as wrappers do."""
    layout = make_layout()
    assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(layout))
    assert pytree.tree_map(torch.clone, layout) == layout
    assert layout != _split()
