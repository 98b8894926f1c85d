"""What latent_attention promises beside the values."""

import pytest
import torch
from attention_cases import assert_bits_equal
from attention_contract import no_host_sync, peak_bytes, with_checkpoint
from latent_cases import BF16, NAMES, LatentCase, cases, run
from module_cases import saved_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

import flamingo_fast as ff
from flamingo_fast.ops import latent_attention as op
from flamingo_fast.ops import varlen_attention
from flamingo_fast.testing.inputs import random_tensor

pytestmark = pytest.mark.matrix

IMPLS = ["torch", "sdpa", "reference", "triton"]
every_impl = pytest.mark.parametrize("impl", IMPLS)
# With an op of their own.
REGISTERED = [impl for impl in IMPLS if impl not in ("sdpa", "reference")]
every_registered = pytest.mark.parametrize("impl", REGISTERED)
# What is large takes the interpreter long; the kernels' own tests have it smaller.
not_interpreted = pytest.mark.parametrize("impl", ["torch"])

SETTINGS = {
    "mha": LatentCase(dtype=BF16),
    "gqa_lengths": LatentCase(heads=4, kv_heads=2, media_seqlens=(3, 0, 11), dtype=BF16),
    "projection": LatentCase(
        media_layout="projection", latents_layout="projection", dtype=torch.float32
    ),
    "no_features": LatentCase(features=0),
}
LONG = {
    "long": LatentCase(2, features=2100, media_seqlens=(2100, 30), media_layout="projection"),
    "long_bf16": LatentCase(2, features=2100, dtype=BF16),
    "groups": LatentCase(9, 64, 200, 8, 2, 64, dtype=BF16),
    "groups_fp32": LatentCase(9, 64, 200, 8, 2, 64),
}
every_registered_and_size = pytest.mark.parametrize(
    ("impl", "case"),
    [
        pytest.param(impl, case, id=f"{name}-{impl}")
        for impl in REGISTERED
        for name, case in (SETTINGS | LONG).items()
        if impl == "torch" or name in SETTINGS
    ],
)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("impl", "name"),
    [(impl, name) for impl in REGISTERED for name in SETTINGS]
    + [("sdpa", "gqa_lengths"), ("reference", "gqa_lengths")],
)
def test_compile_fullgraph(impl, name, checkpointed, guarded):
    torch._dynamo.reset()
    case = SETTINGS[name]
    function = case.call(impl)
    attend = with_checkpoint(function) if checkpointed else function
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_bits_equal(run(compiled, case), run(function, case))


@pytest.mark.parametrize(
    "frozen",
    [(), ("q",), NAMES[1:3], NAMES[3:], NAMES[1:]],
    ids=lambda names: "".join(names) or "-",
)
@cases(SETTINGS)
@every_impl
def test_fake_tensors_have_the_real_metadata(impl, case, frozen):
    def results(inputs, lengths):
        out = ff.latent_attention(**inputs, media_seqlens=lengths, impl=impl)
        wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
        return [out, *torch.autograd.grad(out, wanted, out.detach())]

    inputs, lengths = case.inputs(), case.lengths()
    for name in frozen:
        inputs[name].requires_grad_(False)
    mode = FakeTensorMode()
    fake_inputs = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
    fake_lengths = None if lengths is None else mode.from_tensor(lengths)
    with mode:
        fakes = results(fake_inputs, fake_lengths)
    for real, fake in zip(results(inputs, lengths), fakes, strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
        assert fake.stride() == real.stride() or real.numel() == 0


@pytest.mark.parametrize("need_lse", [False, True])
@cases(SETTINGS | {"long": LatentCase(1, features=2100)})
@every_registered
def test_opcheck_of_the_forward(impl, case, need_lse, guarded):
    tensors = [tensor.detach() for tensor in case.inputs().values()]
    lengths = None if case.media_seqlens is None else case.lengths().int()
    torch.library.opcheck(
        torch.ops.flamingo_fast.latent_attention_fwd, (*tensors, lengths, 0.3, need_lse, impl)
    )


@pytest.mark.parametrize("interleaved", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
@cases(SETTINGS)
@every_registered
def test_opcheck_of_the_backward(impl, case, needed, interleaved, guarded):
    tensors = [tensor.detach() for tensor in case.inputs().values()]
    lengths = None if case.media_seqlens is None else case.lengths().int()
    ops = torch.ops.flamingo_fast
    out, lse = ops.latent_attention_fwd(*tensors, lengths, 0.3, True, impl)
    torch.library.opcheck(
        ops.latent_attention_bwd,
        (case.dout(), *tensors, out, lse, lengths, 0.3, *needed, *interleaved, impl),
    )


@cases({"mha": LatentCase(), **LONG})
def test_the_log_sum_of_the_torch_implementation(case):
    tensors = [tensor.detach() for tensor in case.inputs().values()]
    lengths = None if case.media_seqlens is None else case.lengths().int()
    _, lse = torch.ops.flamingo_fast.latent_attention_fwd(*tensors, lengths, 0.3, True, "torch")
    q, k_media, _, k_latents, _ = (tensor.double() for tensor in tensors)
    keys = torch.cat([k_media, k_latents], 1).repeat_interleave(q.shape[2] // k_media.shape[2], 2)
    scores = torch.einsum("brhd,bshd->bhrs", q, keys) * 0.3
    if lengths is not None:
        padding = torch.arange(case.features) >= lengths[:, None]
        scores[..., : case.features].masked_fill_(padding[:, None, None], float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@cases(SETTINGS)
@every_impl
def test_activation_checkpointing(impl, case, guarded):
    function = case.call(impl)
    assert_bits_equal(run(with_checkpoint(function), case), run(function, case))


@every_registered
def test_double_backward_raises(impl):
    inputs = LatentCase().inputs()
    out = ff.latent_attention(**inputs, impl=impl)
    for loss in (out.square().sum(), out.sum()):  # whose gradient needs one itself, and not
        (dq,) = torch.autograd.grad(loss, inputs["q"], create_graph=True)
        with pytest.raises(RuntimeError, match="latent_attention: its gradients have no gradients"):
            dq.sum().backward()


@every_registered_and_size
def test_autocast_changes_no_bit(impl, case):
    """Neither of the forward, nor of a backward inside of it."""
    function = case.call(impl)
    plain = run(function, case)
    with torch.autocast("cpu", BF16):
        assert_bits_equal(run(function, case), plain)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@every_impl
def test_autocast_leaves_the_dtype(impl, dtype):
    case = LatentCase(dtype=dtype)
    with torch.autocast("cpu", BF16):
        assert {x.dtype for x in run(case.call(impl), case).values()} == {dtype}


@cases({"few": LatentCase(), "long": LatentCase(1, features=2100)})
@every_registered
def test_gradients_of_halves_of_one_projection_are_halves_too(impl, case):
    inputs = {"q": case.inputs()["q"]}
    for seed, source in enumerate(("media", "latents")):
        num_keys = case.features if source == "media" else case.latents
        projected = random_tensor((case.batch, num_keys, 2, 2, 16), seed=seed)
        for name, half in zip(("k", "v"), projected.unbind(2), strict=True):
            inputs[f"{name}_{source}"] = half.requires_grad_()
    inputs = {name: inputs[name] for name in NAMES}
    out = ff.latent_attention(**inputs, impl=impl)
    gradients = torch.autograd.grad(out.square().sum(), tuple(inputs.values()))
    grads = dict(zip(NAMES, gradients, strict=True))
    for source in ("media", "latents"):
        dk, dv = grads[f"k_{source}"], grads[f"v_{source}"]
        assert dk.stride() == dv.stride() == inputs[f"k_{source}"].stride()
        assert dk.untyped_storage().data_ptr() == dv.untyped_storage().data_ptr()


@cases(SETTINGS)
@every_impl
def test_inference_mode(impl, case, guarded):
    with torch.inference_mode():
        served = case.call(impl)(**case.inputs())
    assert torch.equal(served, run(case.call(impl), case)["out"])


@pytest.mark.parametrize(
    "frozen", [("q",), NAMES[1:3], NAMES[3:], NAMES[1:], ("k_media",)], ids="".join
)
@every_registered_and_size
def test_frozen_inputs_change_no_other_gradient(impl, case, frozen, guarded):
    everything = run(case.call(impl), case)
    inputs = case.inputs()
    for name in frozen:
        inputs[name].requires_grad_(False)
    some = run(case.call(impl), case, inputs=inputs)
    assert some.keys() == everything.keys() - {f"d{name}" for name in frozen}
    assert_bits_equal(some, {name: everything[name] for name in some})


@every_registered_and_size
def test_repetition_changes_no_bit(impl, case, guarded):
    assert_bits_equal(run(case.call(impl), case), run(case.call(impl), case))


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@cases(
    {
        "few": LatentCase(5, media_seqlens=(3, 0, 11, 11, 2)),
        "one_head": LatentCase(3, 64, 600, 1, head_dim=64),
        "groups": LatentCase(9, 64, 200, 4, 2, 48),
        "equal_lengths": LatentCase(6, 64, 200, 2, media_seqlens=(200, 200, 200, 9, 9, 200)),
        "long": LatentCase(2, features=2100, media_seqlens=(2060, 2100)),
    }
)
@not_interpreted
def test_a_medium_does_not_depend_on_the_batch(impl, case, dtype, threads, guarded):
    """Nor do its gradients."""
    inputs = [tensor.detach().to(dtype) for tensor in case.inputs().values()]
    dout, lengths = case.dout().to(dtype), case.lengths()

    def results(media: slice):
        leaves = [tensor[media].clone().requires_grad_() for tensor in inputs]
        some = None if lengths is None else lengths[media]
        out = ff.latent_attention(*leaves, media_seqlens=some, impl=impl)
        return [out, *torch.autograd.grad(out, leaves, dout[media])]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        everything = results(slice(None))
        for media in (slice(0, 1), slice(1, 3), slice(case.batch - 1, case.batch)):
            for one, all_media in zip(results(media), everything, strict=True):
                assert torch.equal(one, all_media[media])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(
    "case",
    [LatentCase(1, 64, 16384, 8, head_dim=64), LatentCase(40, 64, 512, 8, head_dim=64)],
    ids=["long", "many"],
)
def test_the_torch_implementation_allocates_little(case, dtype):
    """Forward: twice the output and what PyTorch's flash kernel packs. Backward: the gradients, one
    medium's keys and values and a number of bytes. Nothing of rows times keys, nothing of all keys
    of a batch."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in case.inputs().values()]
    outputs = []
    forward = peak_bytes(lambda: outputs.append(ff.latent_attention(*inputs, impl="torch")))
    backward = peak_bytes(lambda: torch.autograd.grad(outputs[0], inputs, case.dout().to(dtype)))
    q_bytes, input_bytes = inputs[0].nbytes, sum(tensor.nbytes for tensor in inputs)
    packed = sum(tensor.nbytes for tensor in inputs[1:3]) if dtype == BF16 else 0
    assert forward <= 5 * q_bytes + packed + (16 << 20)
    assert backward <= input_bytes + (56 << 20)
    scores = case.batch * case.heads * case.latents * (case.latents + case.features)
    assert input_bytes + (56 << 20) < input_bytes + 8 * 4 * scores


@every_registered
def test_saved_for_backward(impl, guarded):
    """The inputs, the output and a log-sum a row and head: two parts, by the kernels in fp32."""
    case = LatentCase(latents=8, features=32, media_seqlens=(32, 4, 0))
    inputs, lengths = case.inputs(), case.lengths().int()
    others = saved_bytes(
        lambda: ff.latent_attention(**inputs, media_seqlens=lengths, impl=impl),
        [*inputs.values(), lengths],
    )
    lse_bytes = 4 * 3 * 8 * 2 * (2 if impl == "triton" else 1)
    assert sorted(others.values()) == sorted([lse_bytes, inputs["q"].nbytes])


LIBRARIES = ["varlen", "flash_attn", "xformers"]


@pytest.mark.parametrize("impl", LIBRARIES)
def test_libraries_refuse_on_a_cpu_by_name(impl):
    inputs = LatentCase(dtype=BF16).inputs()
    with pytest.raises(ff.BackendUnavailableError, match=f'impl="{impl}".*GPU'):
        ff.latent_attention(**inputs, impl=impl)
    with ff.use_impl(impl), pytest.raises(ff.BackendUnavailableError, match=impl):
        ff.latent_attention(**inputs)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_use_impl(impl, monkeypatch):
    case = LatentCase()
    expected = run(case.call(impl), case)
    for name in ("_forward_op", "_backward_op"):
        monkeypatch.setattr(op, name, lambda *arguments: pytest.fail("another implementation"))
    with ff.use_impl(impl):
        assert_bits_equal(run(case.call("auto"), case), expected)


def test_compile_fullgraph_of_a_projection_inside(guarded):
    """Both halves are views that the compiled function makes."""
    case = SETTINGS["mha"]
    q = case.inputs()["q"]
    media, latents = (random_tensor((3, n, 2, 2, 16), BF16, seed=n) for n in (11, 6))

    def attend(q, media, latents):
        return ff.latent_attention(q, *media.unbind(2), *latents.unbind(2), impl=REGISTERED[0])

    torch._dynamo.reset()
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in (q, media, latents)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, case.dout())])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@cases(SETTINGS | {"too_long": LatentCase(media_seqlens=(90, 0, 4))})
def test_the_layout_of_libraries_is_the_mask_of_the_oracle(case):
    """Attention under it, by loops over what it says, is the oracle's."""
    inputs = {name: tensor.detach().double() for name, tensor in case.inputs().items()}
    k, v, layout = op.of_one_source(*inputs.values(), case.lengths())
    assert (layout.media_total, layout.max_media_per_token) == (case.batch, 1)
    assert layout.attends().all()
    layout.validate()
    valid = layout.media_seqlens
    lengths = [k.shape[1]] * case.batch if valid is None else valid.tolist()
    outs = []
    for medium, length in enumerate(lengths):
        assert layout.media_start[medium].tolist() == [0] * case.latents
        q = inputs["q"][medium].unflatten(1, (k.shape[2], -1))
        keys, values = k[medium, :length], v[medium, :length]
        weights = torch.einsum("rhgd,shd->hgrs", q, keys).mul(case.head_dim**-0.5).softmax(-1)
        outs.append(torch.einsum("hgrs,shd->rhgd", weights, values).flatten(1, 2))
    expected = case.call_reference()(**inputs)
    torch.testing.assert_close(torch.stack(outs), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_metadata_for_libraries_is_built_without_a_host_sync(with_lengths):
    case = LatentCase(dtype=BF16)
    inputs = {name: tensor.to("meta") for name, tensor in case.inputs().items()}
    lengths = torch.zeros(case.batch, dtype=torch.int32, device="meta") if with_lengths else None
    with no_host_sync():
        k, _, layout = op.of_one_source(*inputs.values(), lengths)
        varlen_attention.varlen_metadata(layout, k.shape[1])
    assert layout.device.type == "meta"
