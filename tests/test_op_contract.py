"""What every op promises beside its values."""

import functools

import pytest
import torch
import torch._inductor.config
from attention_cases import assert_bits_equal
from module_cases import saved_bytes
from op_cases import OPS, Case, Op, check
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import flamingo_fast as ff
from flamingo_fast.bench.registry import Unavailable, require_cpp
from flamingo_fast.kernels.launch import Target, recording
from flamingo_fast.testing.compare import outputs_and_gradients
from flamingo_fast.testing.guard import guard

pytestmark = pytest.mark.matrix

IMPLS = ["torch", "triton"]
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
every_impl = pytest.mark.parametrize("impl", IMPLS)


def _run(op: Op, case: Case, impl: str, wrap=lambda function: function) -> dict[str, torch.Tensor]:
    function = wrap(functools.partial(op.ours, impl=impl))
    return outputs_and_gradients(function, case.inputs(op), op.outputs, case.output_gradients(op))


@every_op
def test_compile_fullgraph(op, guarded):
    """The kernels are opaque to the compiler, so a compiled call returns the eager bits."""
    case = Case((3, 5, 48), torch.bfloat16, parameter_dtype=torch.float32)
    compiled = _run(
        op,
        case,
        "triton",
        wrap=functools.partial(torch.compile, fullgraph=True, backend="aot_eager"),
    )
    assert_bits_equal(compiled, _run(op, case, "triton"))


def test_compile_with_shapes_that_may_change():
    """Checks of arguments see symbols for x's sizes, and numbers for those of weights."""
    x, norm = torch.randn(3, 48), torch.nn.LayerNorm(48)

    def function(x):
        return ff.layer_norm(x, norm.weight, norm.bias, eps=1e-5, impl="torch")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), function(x))


def test_compile_with_inductor():
    """Through Inductor: the kernels stay as they are, the torch implementation is fused by it."""
    try:
        require_cpp()
    except Unavailable as reason:
        pytest.skip(f"needs apt package g++ or python3-dev: {reason}")

    def function(x, y, gate, weight, bias):
        with ff.use_impl("triton"):
            residual, normed = ff.gated_residual_norm(x, y, gate, weight, bias, eps=1e-5)
        return residual, ff.squared_relu(normed, impl="torch")

    op = OPS["gated_residual_layer_norm"]
    case = Case((6, 48))
    run = functools.partial(
        outputs_and_gradients,
        inputs=case.inputs(op),
        output_names=op.outputs,
        output_gradients=case.output_gradients(op),
    )
    # Precompiling headers takes an openssl program, which fails now and then.
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        compiled = run(torch.compile(function, fullgraph=True))
    eager = run(function)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-5, msg=name)


def _raw_calls(impl: str):
    """Arguments of every registered op."""
    x, y = torch.randn(6, 48), torch.randn(6, 48, dtype=torch.bfloat16)
    gate, weight, bias = torch.randn(48), torch.randn(48), torch.randn(48)
    mean, rstd = torch.randn(6), torch.rand(6)
    wide = torch.randn(6, 4100)
    bf16 = torch.bfloat16
    ops = torch.ops.flamingo_fast
    return [
        (ops.squared_relu_fwd, (y, impl)),
        (ops.squared_relu_bwd, (y, x, impl)),
        (ops.gated_residual_fwd, (x, y, gate, impl)),
        (ops.gated_residual_bwd, (x, y, gate, bf16, True, impl)),
        (ops.gated_residual_bwd, (y, None, y[0], bf16, False, impl)),
        (ops.norm_fwd, (x, weight, bias, 1e-5, False, bf16, impl)),
        (ops.norm_fwd, (x.mT.contiguous().mT, weight, None, 1e-5, True, x.dtype, impl)),
        (ops.norm_bwd, (x, x, weight, bias, mean, rstd, False, True, True, True, impl)),
        (ops.norm_bwd, (y, y, y[0], None, mean[:0], rstd, True, True, False, False, impl)),
        (ops.gated_residual_norm_fwd, (x, y, gate, weight, bias, 1e-5, False, bf16, impl)),
        (
            ops.gated_residual_norm_bwd,
            (x, x, x, y, gate, weight, bias, mean, rstd, False, bf16, *[True] * 4, impl),
        ),
        (
            ops.gated_residual_norm_bwd,
            (None, y, y, None, y[0, :1], None, None, mean[:0], rstd, True, bf16)
            + (True, True, False, False, impl),
        ),
        # Wide rows, where the gradient of a vector gate needs a dx that is not asked for.
        (
            ops.gated_residual_norm_bwd,
            (wide, wide, wide, wide, wide[0], wide[0], None, mean[:0], rstd, True, x.dtype)
            + (False, False, True, False, impl),
        ),
        *_raw_attention_calls(impl),
        *_raw_calls_of_several_media(impl),
        *_raw_calls_of_latents(impl),
    ]


def _raw_attention_calls(impl: str):
    """Some on 170 tokens of one medium, which is split; most on a few."""
    forward = torch.ops.flamingo_fast.one_medium_attention_fwd
    backward = torch.ops.flamingo_fast.one_medium_attention_bwd
    few, many = (
        ff.MediaLayout.from_media_locations(torch.arange(seqlen)[None] == 1, 2)
        for seqlen in (5, 170)
    )
    assert (many.split_media[:, 0] >= 0).any()
    lengths = torch.tensor([3, 0], dtype=torch.int32)
    k, v = torch.randn(2, 2, 8, 1, 16)
    halves = torch.randn(2, 8, 2, 1, 16).unbind(2)
    stepped = torch.randn(1, 5, 2, 32)[..., ::2]

    sorted_rows = ff.MediaLayout.from_intervals(few.media_start, few.media_end, 2, 1)

    def gradients(layout, dtype, kv, seqlens, need_dq, need_dkv, interleaved):
        q = torch.randn(1, layout.seqlen, 2, 16, dtype=dtype)
        log_sums = torch.randn((1, 1, layout.seqlen, 2) if impl == "triton" else 0)
        arguments = (q, q, *(tensor.to(dtype) for tensor in kv), log_sums)
        schedule = (layout.work_items, layout.split_media, layout.row_index, seqlens)
        return backward, (*arguments, *schedule, 0.25, need_dq, need_dkv, interleaved, impl)

    return [
        (forward, (stepped, k, v, few.work_items, None, None, 0.25, True, impl)),
        (forward, (stepped, *halves, few.work_items, None, lengths, 0.25, False, impl)),
        gradients(many, torch.bfloat16, (k, v), None, True, True, False),
        gradients(few, torch.float32, (k, v), lengths, True, False, False),
        gradients(few, torch.float32, halves, lengths, True, True, True),
        gradients(sorted_rows, torch.bfloat16, halves, None, False, True, True),
    ]


def _raw_calls_of_several_media(impl: str):
    """On masks with holes, media of five keys and of more than a split has."""
    forward = torch.ops.flamingo_fast.several_media_attention_fwd
    backward = torch.ops.flamingo_fast.several_media_attention_bwd
    layout = ff.MediaLayout.from_media_mask(
        torch.tensor([[[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]]])
    )
    intervals = (layout.media_start, layout.media_end, layout.media_bits)
    lengths = torch.tensor([3, 0, 5], dtype=torch.int32)
    bf16, fp32 = torch.bfloat16, torch.float32

    def media(num_keys, dtype, interleaved=False):
        both = torch.randn(3, num_keys, 2, 1, 16, dtype=dtype)
        return both.unbind(2) if interleaved else [half.contiguous() for half in both.unbind(2)]

    def call(dtype, num_keys, seqlens, dense, need_lse):
        q = torch.randn(1, 4, 2, 16, dtype=dtype)
        arguments = (q, *media(num_keys, dtype), *intervals, layout.cu_media, seqlens)
        return forward, (*arguments, 3, dense, 0.25, need_lse, impl)

    def gradients(dtype, seqlens, dense, need_dq, need_dkv, interleaved):
        q = torch.randn(1, 4, 2, 16, dtype=dtype)
        log_sums = torch.randn(1, 4, 2)
        if impl == "triton":
            log_sums = torch.randn(2 if dtype == fp32 else 1, 1, 1, 4, 2)
        tensors = (q, q, *media(5, dtype, interleaved), q, log_sums, *intervals)
        masks = (layout.media_rows, layout.cu_media, seqlens, 3, dense)
        return backward, (*tensors, *masks, 0.25, need_dq, need_dkv, interleaved, impl)

    return [
        call(fp32, 5, None, False, True),
        call(bf16, 5, lengths, True, False),
        call(bf16, 1100, None, False, True),
        gradients(fp32, None, False, True, True, False),
        gradients(bf16, lengths, True, True, True, True),
        gradients(bf16, None, False, True, False, False),
        gradients(fp32, lengths, False, False, True, True),
    ]


def _raw_calls_of_latents(impl: str):
    """One each; test_latent_contract.py has the combinations."""
    ops = torch.ops.flamingo_fast
    q = torch.randn(2, 3, 4, 16)
    k_media, v_media = torch.randn(2, 7, 2, 2, 16).unbind(2)
    latents = torch.randn(2, 2, 3, 2, 16).unbind(0)
    tensors = (q, k_media, v_media, *latents)
    lengths = torch.tensor([7, 0], dtype=torch.int32)
    out, lse = ops.latent_attention_fwd(*tensors, lengths, 0.25, True, impl)
    needs = (True, True, True)
    interleaved = (True, False)
    return [
        (ops.latent_attention_fwd, (*tensors, lengths, 0.25, True, impl)),
        (
            ops.latent_attention_bwd,
            (q, *tensors, out, lse, lengths, 0.25, *needs, *interleaved, impl),
        ),
    ]


@every_impl
def test_opcheck(impl, guarded):
    calls = _raw_calls(impl)
    ops = torch.ops.flamingo_fast
    registered = {
        name for name in dir(ops) if isinstance(getattr(ops, name), torch._ops.OpOverloadPacket)
    }
    # It has a test_opcheck of its own.
    registered -= {"linear_cross_entropy"}
    assert registered == {call._qualified_op_name.split("::")[1] for call, _ in calls}
    for call, arguments in calls:
        torch.library.opcheck(call, arguments)


@every_op
@every_impl
def test_fake_tensors_have_the_real_metadata(op, impl):
    case = Case((3, 5, 48), torch.bfloat16, parameter_dtype=torch.float32, x_layout="transposed")
    real = op.ours(*case.inputs(op).values(), impl=impl)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor) for tensor in case.inputs(op).values()]
    with mode:
        fake = op.ours(*fakes, impl=impl)
        sum(output.sum() for output in (fake if isinstance(fake, tuple) else (fake,))).backward()
    for real_output, fake_output in zip(
        *(outputs if isinstance(outputs, tuple) else (outputs,) for outputs in (real, fake)),
        strict=True,
    ):
        assert fake_output.shape == real_output.shape
        assert fake_output.dtype == real_output.dtype
        assert fake_output.stride() == real_output.stride()
    for fake_input in fakes:
        assert fake_input.grad.dtype == fake_input.dtype


@every_op
def test_gradcheck_of_the_reference(op):
    inputs = Case((3, 5), torch.float64, vector_gate=True).inputs(op)
    assert torch.autograd.gradcheck(op.reference, tuple(inputs.values()))


@every_op
def test_torch_implementation_takes_fp64(op):
    inputs = Case((3, 5), torch.float64, vector_gate=True).inputs(op)
    assert torch.autograd.gradcheck(
        functools.partial(op.ours, impl="torch"), tuple(inputs.values())
    )


@every_impl
@every_op
def test_autocast(op, impl):
    """Inside autocast the residual keeps its dtype, normed has autocast's, and values stay."""
    case = Case((6, 48), y_dtype=torch.bfloat16)
    plain = _run(op, case, impl)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        outputs = _run(op, case, impl)
    for name, expected in plain.items():
        if name == "normed":
            assert outputs[name].dtype == torch.bfloat16
        else:
            assert outputs[name].dtype == expected.dtype
        # The gradient of normed arrives rounded to bf16.
        is_exact = "normed" not in plain or name == "residual"
        rtol, atol = (0, 0) if is_exact else (1e-2, 3e-2)
        torch.testing.assert_close(outputs[name].float(), expected.float(), rtol=rtol, atol=atol)


@every_impl
@every_op
def test_activation_checkpointing(op, impl, guarded):
    case = Case((6, 48), torch.bfloat16, parameter_dtype=torch.float32)

    def checkpointed(function):
        return lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)

    assert_bits_equal(_run(op, case, impl, wrap=checkpointed), _run(op, case, impl))


@every_impl
@every_op
def test_double_backward_raises(op, impl):
    inputs = Case((6, 48), torch.bfloat16).inputs(op)
    outputs = op.ours(*inputs.values(), impl=impl)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    name = getattr(op.ours, "func", op.ours).__name__
    for loss in (first.square().sum(), first.sum()):  # whose gradient needs one itself, and not
        (dx,) = torch.autograd.grad(loss, inputs["x"], create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}.*have no gradients"):
            dx.sum().backward()


class _Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.cpu
@every_impl
@every_op
def test_modes_and_profilers_see_the_op_and_change_nothing(op, impl):
    case = Case((5, 32), torch.bfloat16)
    expected = _run(op, case, impl)
    function = functools.partial(op.ours, impl=impl)
    inputs, douts = case.inputs(op), case.output_gradients(op)
    mode = _Names()
    with profile() as profiler, mode:
        out = function(*inputs.values())
    assert any("flamingo_fast" in name for name in mode.names)
    assert any("flamingo_fast::" in event.key for event in profiler.key_averages())
    outs = out if isinstance(out, tuple) else (out,)
    with torch.device("meta"):
        again = function(*inputs.values())
        again = again if isinstance(again, tuple) else (again,)
        leaves = [x for x in inputs.values() if x is not None]
        gradients = torch.autograd.grad(again, leaves, list(douts))
    for name, got in zip(op.outputs, outs, strict=True):
        assert torch.equal(got, expected[name])
    for name, got in zip(op.outputs, again, strict=True):
        assert torch.equal(got, expected[name])
    for name, got in zip(op.inputs, gradients, strict=True):
        assert torch.equal(got, expected[f"d{name}"])


@pytest.mark.cpu
@every_impl
def test_batches_of_gradients(impl):
    """Of the older vmap, whose tensors say of themselves that they are plain."""
    x = torch.randn(4, 6, requires_grad=True)
    out = ff.squared_relu(x, impl=impl)
    douts = torch.randn(3, 4, 6)
    (found,) = torch.autograd.grad(out, x, douts, is_grads_batched=True)
    torch.testing.assert_close(found, 2 * x.detach().relu() * douts)


@every_op
def test_program_order_and_repetition_change_no_bit(op):
    case = Case((130, 48), torch.bfloat16, vector_gate=True)
    runs = []
    for seed in (0, 1, 1):
        with guard(shuffle_seed=seed):
            runs.append(_run(op, case, "triton"))
    assert_bits_equal(runs[1], runs[0])
    assert_bits_equal(runs[2], runs[0])


@pytest.mark.parametrize("width", [48, 1024, 5000])
@every_op
def test_a_row_does_not_depend_on_the_batch(op, width, guarded):
    """Of kernels only: PyTorch's CPU loops round their vectorised part and its tail apart."""
    inputs = {
        name: None if tensor is None else tensor.detach()
        for name, tensor in Case((37, width), torch.bfloat16).inputs(op).items()
    }
    alone = {
        name: tensor[11:12] if name in ("x", "y") else tensor for name, tensor in inputs.items()
    }
    everything, one = (op.ours(*chosen.values(), impl="triton") for chosen in (inputs, alone))
    pairs = zip(everything, one, strict=True) if len(op.outputs) > 1 else [(everything, one)]
    for all_rows, row in pairs:
        assert torch.equal(all_rows[11:12], row)


@every_impl
@every_op
def test_saved_for_backward(op, impl):
    """At most one tensor of x's size, one of y's, and O(rows + width)."""
    case = Case((64, 256), torch.bfloat16, parameter_dtype=torch.float32, vector_gate=True)
    inputs = case.inputs(op)
    saved = saved_bytes(lambda: op.ours(*inputs.values(), impl=impl))
    rows, width = case.shape
    big = sum(inputs[name].nbytes for name in ("x", "y") if name in inputs)
    assert sum(saved.values()) <= big + 8 * rows + 12 * width


@every_impl
def test_frozen_parameters_are_neither_saved_nor_computed(impl):
    """With a frozen gate y is not kept; with frozen parameters no partial sums are launched."""
    op = OPS["gated_residual_layer_norm"]
    case = Case((64, 256), frozen=("gate", "weight", "bias"))
    inputs = case.inputs(op)
    saved = []
    with (
        guard() as guarded,
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.untyped_storage().data_ptr()) or tensor,
            lambda tensor: tensor,
        ),
    ):
        residual, normed = op.ours(*inputs.values(), impl=impl)
        (residual.sum() + normed.square().sum()).backward()
    assert inputs["y"].untyped_storage().data_ptr() not in saved
    expected = ["_norm_fwd_kernel", "_norm_bwd_kernel"] if impl == "triton" else []
    assert [launch.kernel for launch in guarded.launches] == expected


@every_impl
@every_op
def test_second_use_of_outputs(op, impl, guarded):
    """Each output is used twice, and its gradient comes expanded from a sum."""
    case = Case((9, 48))
    inputs, inputs_once = case.inputs(op), case.inputs(op)
    for leaves, times in ((inputs, 2), (inputs_once, 1)):
        outputs = op.ours(*leaves.values(), impl=impl)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        factor = 2 / times
        sum(factor * output.sum() for output in outputs for _ in range(times)).backward()
    for name, tensor in inputs.items():
        torch.testing.assert_close(tensor.grad, inputs_once[name].grad, rtol=1e-6, atol=1e-6)


def test_use_impl_chooses_for_auto_only(guarded):
    x = torch.randn(4, 8)
    with ff.use_impl("triton"):
        ff.squared_relu(x)
        ff.squared_relu(x, impl="torch")
        with ff.use_impl("reference"):
            ff.squared_relu(x)
        ff.squared_relu(x)
    ff.squared_relu(x)
    assert len(guarded.launches) == 2


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_slices_of_a_fused_projection_are_not_copied(norm, guarded):
    """q/k-norms: a (batch, seqlen, heads, head_dim) slice is read where it lies."""
    q = torch.randn(2, 5, 3, 4, 64)[:, :, 1]
    with recording(Target("sm_90", num_sms=132)) as launches:
        OPS[norm].ours(q, torch.ones(64), None, impl="triton")
    assert launches[0].args[0].data_ptr() == q.data_ptr()
    check(OPS[norm], Case((2, 5, 4, 64), x_layout="sliced"), "triton")
