"""linear_cross_entropy: values, the gradients that are wanted, and never all logits in memory."""

import functools
import itertools
import math

import pytest
import torch
from attention_contract import with_checkpoint
from cross_entropy_cases import (
    BF16,
    CHUNK_BYTES,
    EXTRA,
    FP32,
    INPUTS,
    REDUCTIONS,
    ROWS,
    VOCAB,
    WIDTH,
    check,
    every_dtype,
    every_extra,
    every_reduction,
    extra,
    inputs_of,
    labels_of,
    ours,
    plain,
    run,
    tensors,
)

import flamingo_fast as ff
from flamingo_fast.ops.linear_cross_entropy import linear_cross_entropy
from flamingo_fast.testing.compare import outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU: no values are looked at, and ignored rows stay among the others."""
    module = "flamingo_fast.ops.linear_cross_entropy"
    monkeypatch.setattr(f"{module}.values_are_at_hand", lambda tensor: False)


@every_reduction
@every_extra
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
@every_dtype
def test_values_and_gradients(dtype, impl, bias, extra_ids, reduction):
    inputs = inputs_of(extra_ids, bias, dtype)
    found = check(
        inputs, labels=labels_of(extra_ids), extra_ids=extra_ids, reduction=reduction, impl=impl
    )
    assert found["loss"].dtype == FP32
    assert found["dhidden"].dtype == dtype


@every_reduction
@every_extra
@every_dtype
def test_values_and_gradients_where_labels_are_not_read(dtype, extra_ids, reduction, unread):
    inputs = inputs_of(extra_ids, dtype=dtype)
    check(inputs, labels=labels_of(extra_ids), extra_ids=extra_ids, reduction=reduction)


def compiled(function=ours):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("extra_ids", "reduction"), [((), "mean"), *((EXTRA["both"], each) for each in REDUCTIONS)]
)
def test_compiled(extra_ids, reduction):
    """One op of the graph, which is the same for any number of rows after the first."""
    function = compiled()
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (ROWS, 31, 17):
            options = {"labels": labels_of(extra_ids, rows), "extra_ids": extra_ids}
            inputs = inputs_of(extra_ids, rows=rows)
            found = run(function, inputs, reduction, **options)
            assert_same(found, run(ours, inputs, reduction, **options))


@every_reduction
def test_compiled_with_a_frozen_vocabulary(reduction):
    inputs = inputs_of(EXTRA["both"], frozen=("weight", "bias"))
    options = {"labels": labels_of(EXTRA["both"]), "extra_ids": EXTRA["both"]}
    found = run(compiled(), inputs, reduction, **options)
    assert_same(found, run(ours, inputs, reduction, **options))


def test_compiled_with_ids_in_a_tensor():
    labels, ids = labels_of(EXTRA["both"]), torch.tensor(EXTRA["both"])
    inputs = inputs_of(EXTRA["both"])

    def function(hidden, weight, bias, extra_weight, ids):
        options = {"extra_weight": extra_weight, "extra_ids": ids, "chunk_bytes": CHUNK_BYTES}
        return linear_cross_entropy(hidden, weight, bias, labels, **options)

    found = outputs_and_gradients(
        compiled(function), inputs | {"ids": ids}, ("loss",), [torch.tensor(1.7)]
    )
    assert_same(found, run(ours, inputs, labels=labels, extra_ids=EXTRA["both"]))


def test_compiled_in_autocast():
    inputs, labels = inputs_of(), labels_of()
    with torch.autocast(inputs["hidden"].device.type, BF16):
        found = run(compiled(), inputs, labels=labels)
        expected = run(ours, inputs, labels=labels)
    assert_same(found, expected)


def test_compiled_without_gradients():
    inputs, labels = inputs_of(frozen=INPUTS), labels_of()
    loss = compiled()(*inputs.values(), labels=labels)
    torch.testing.assert_close(loss, ours(*inputs.values(), labels=labels))


@pytest.mark.parametrize("wanted", [[True] * 4, [False] * 4, [True, False, False, True]], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_opcheck(dtype, wanted):
    extra_ids = EXTRA["both"]
    plain_inputs = [tensor.detach() for tensor in inputs_of(extra_ids).values()]
    dlosses = random_tensor((ROWS,), seed=8)
    of_op = torch.ops.flamingo_fast.linear_cross_entropy.default
    options = (-100, CHUNK_BYTES, dtype, wanted)
    ids, labels = torch.tensor(extra_ids), labels_of(extra_ids)
    torch.library.opcheck(of_op, (*plain_inputs, ids, labels, dlosses, *options))
    hidden, weight = (tensor.mT.contiguous().mT for tensor in plain_inputs[:2])
    torch.library.opcheck(of_op, (hidden, weight, None, None, None, labels_of(), None, *options))


@pytest.mark.parametrize("chunk_rows", [1, 7, 8, 30, 44, 45, 1000])
@every_extra
def test_chunks(extra_ids, chunk_rows):
    labels = labels_of(extra_ids).masked_fill(torch.arange(ROWS) == 3, 2)
    options = {"labels": labels, "extra_ids": extra_ids}
    check(inputs_of(extra_ids), chunk_bytes=chunk_rows * 8 * VOCAB, **options)
    whole = run(ours, inputs_of(extra_ids), chunk_bytes=1 << 30, **options)
    few = run(ours, inputs_of(extra_ids), chunk_bytes=1, **options)
    for name, tensor in whole.items():
        torch.testing.assert_close(few[name], tensor, rtol=1e-5, atol=1e-5)


@every_reduction
def test_every_subset_of_gradients(reduction):
    extra_ids = EXTRA["both"]
    options = {"labels": labels_of(extra_ids), "extra_ids": extra_ids, "reduction": reduction}
    whole = run(ours, inputs_of(extra_ids), **options)
    for count in (1, 2, 3):
        for frozen in itertools.combinations(INPUTS, count):
            found = run(ours, inputs_of(extra_ids, frozen=frozen), **options)
            assert found.keys() == {"loss", *(f"d{name}" for name in INPUTS if name not in frozen)}
            for name, tensor in found.items():
                torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-5)


@every_reduction
@every_extra
def test_gradcheck(extra_ids, reduction):
    inputs = {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in inputs_of(extra_ids).items()
        if tensor is not None
    }
    options = {"labels": labels_of(extra_ids), "extra_ids": extra_ids, "reduction": reduction}

    def function(*tensors):
        given = dict(zip(inputs, tensors, strict=True))
        return ours(*(given.get(name) for name in INPUTS), **options)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


def test_logits_far_from_zero():
    """Their differences count: the weight's rows and those beside it have one offset."""
    extra_ids = EXTRA["both"]
    inputs = inputs_of(extra_ids)
    with torch.no_grad():
        inputs["hidden"][:, 0] = 1
        for name in ("weight", "extra_weight"):
            inputs[name][:, 0] = 4096
    check(inputs, labels=labels_of(extra_ids), extra_ids=extra_ids)


@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_of_extra_rows_that_decide(sign):
    """Or that do not count at all; each probability of the others, or of these, is 0 in fp32."""
    inputs = inputs_of(EXTRA["both"])
    with torch.no_grad():
        inputs["hidden"][:, 0] = 1
        inputs["extra_weight"][:, 0] = sign * 300
    check(inputs, labels=labels_of(EXTRA["both"]), extra_ids=EXTRA["both"])


@every_reduction
@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("is_read", [True, False], ids=["", "unread"])
def test_no_label_counts(is_read, rows, reduction, request):
    """As of cross_entropy: a mean of nothing is NaN, and its gradients are 0."""
    if not is_read:
        request.getfixturevalue("unread")
    labels = torch.full((rows,), -100)
    found = run(ours, inputs_of(rows=rows), reduction, labels=labels)
    expected = run(plain, inputs_of(rows=rows), reduction, labels=labels)
    assert found["loss"].isnan().all() == (reduction == "mean" or found["loss"].numel() == 0)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ignore_index", [3, VOCAB + 1, VOCAB + 77, -1])
@pytest.mark.parametrize("is_read", [True, False], ids=["", "unread"])
def test_ignore_index(is_read, ignore_index, request):
    """May be an id, also one of extra_ids."""
    if not is_read:
        request.getfixturevalue("unread")
    extra_ids = EXTRA["both"]
    labels = labels_of(extra_ids)
    labels = labels.where(labels != -100, ignore_index)
    options = {"labels": labels, "extra_ids": extra_ids, "ignore_index": ignore_index}
    check(inputs_of(extra_ids), **options)
    check(inputs_of(extra_ids), impl="reference", **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_shapes_and_dtypes_of_labels(dtype):
    inputs = inputs_of(frozen=("weight", "bias"))
    labels = labels_of()
    expected = run(ours, inputs, "none", labels=labels)
    hidden = inputs["hidden"].detach().reshape(5, 9, WIDTH).mT.contiguous().mT.requires_grad_()
    loss = ours(
        *(hidden, inputs["weight"], inputs["bias"], None),
        labels=labels.to(dtype).reshape(5, 9),
        reduction="none",
    )
    assert loss.shape == (5, 9)
    torch.testing.assert_close(loss.flatten(), expected["loss"], rtol=1e-6, atol=1e-6)
    of_one = ours(hidden[0, 1], inputs["weight"], inputs["bias"], None, labels=labels[1].to(dtype))
    torch.testing.assert_close(of_one, expected["loss"][1], rtol=1e-6, atol=1e-6)


@every_reduction
def test_used_twice(reduction):
    """In one expression, and by two backward calls; the kept gradients are not used up."""
    inputs, labels = inputs_of(), labels_of()
    wanted = [tensor for tensor in inputs.values() if tensor is not None]
    loss = ours(*inputs.values(), labels=labels, reduction=reduction)
    expected = plain(*inputs.values(), labels=labels, reduction=reduction)
    twice = [(each * 3).sum() + each.square().sum() for each in (loss, expected)]
    first = torch.autograd.grad(twice[0], wanted, retain_graph=True)
    again = torch.autograd.grad(twice[0], wanted)
    for got, same, right in zip(first, again, torch.autograd.grad(twice[1], wanted), strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_two_losses_of_one_weight():
    inputs, labels = inputs_of(), labels_of()
    hidden, weight, bias, _ = inputs.values()
    function = functools.partial(ours, labels=labels)
    for call in (function, functools.partial(plain, labels=labels)):
        (call(hidden, weight, bias, None) + 2 * call(2 * hidden, weight, bias, None)).backward()
        if call is function:
            found = [tensor.grad.clone() for tensor in (hidden, weight, bias)]
            for tensor in (hidden, weight, bias):
                tensor.grad = None
    for got, tensor in zip(found, (hidden, weight, bias), strict=True):
        torch.testing.assert_close(got, tensor.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dloss", [-1.0, 0.0, 1e-3, 3.3, 2.0**16])
@every_reduction
def test_incoming_gradients(reduction, dloss):
    check(inputs_of(), labels=labels_of(), reduction=reduction, dloss=dloss)


def test_loss_scales_that_fp16_has_not():
    """2 ** 17 is no number of fp16, nor is each logit's gradient times it."""
    inputs = inputs_of(dtype=torch.float16)
    small = {name: None if x is None else x.detach() / 512 for name, x in inputs.items()}
    small = {name: None if x is None else x.requires_grad_() for name, x in small.items()}
    found = run(ours, small, labels=labels_of(), dloss=2.0**17)
    oracle = run(plain, small, labels=labels_of(), dtype=torch.float64, dloss=2.0**17)
    for name in ("dhidden", "dweight", "dbias"):
        assert found[name].dtype == torch.float16
        error = (found[name].double() - oracle[name]).abs().max()
        assert error <= 2**-8 * oracle[name].abs().max(), name


def test_no_double_backward():
    """An error, not the gradients of a constant."""
    inputs = inputs_of()
    options = {"labels": labels_of(), "extra_ids": ()}
    loss = ours(*inputs.values(), **options)
    (dhidden,) = torch.autograd.grad(loss, inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: its gradients have no gradients"):
        dhidden.square().sum().backward()
    losses = [
        ours(*inputs.values(), impl="reference", **options),
        plain(*inputs.values(), **options),
    ]
    penalties = []
    for each in losses:
        (dhidden,) = torch.autograd.grad(each, inputs["hidden"], create_graph=True)
        penalties.append(torch.autograd.grad(dhidden.square().sum(), inputs["weight"])[0])
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-6)


def test_activation_checkpointing():
    inputs, labels = inputs_of(), labels_of()
    expected = run(ours, inputs, labels=labels)

    def function(*tensors, **options):
        return with_checkpoint(functools.partial(ours, **options))(*tensors)

    for name, tensor in run(function, inputs, labels=labels).items():
        assert torch.equal(tensor, expected[name])


@every_reduction
@every_extra
def test_autocast(extra_ids, reduction):
    """Products in its dtype; gradients in the parameters', of 16 bits only what products make."""
    inputs = inputs_of(extra_ids)
    device_type = inputs["hidden"].device.type
    options = {"labels": labels_of(extra_ids), "extra_ids": extra_ids, "reduction": reduction}
    with torch.autocast(device_type, BF16):
        found = run(ours, inputs, **options)
        eager = run(plain, inputs, **options)
        reference = run(ours, inputs, impl="reference", **options)
    oracle = run(plain, inputs, dtype=torch.float64, **options)
    for name, tensor in found.items():
        assert tensor.dtype == FP32
        # Were all in fp32, it would be less.
        assert (tensor - oracle[name]).abs().max() > 1e-4 * oracle[name].abs().max(), name
        for each in (tensor, reference[name]):
            error, limit = ((x - oracle[name]).square().mean().sqrt() for x in (each, eager[name]))
            assert error <= 2 * (limit + 2**-8 * oracle[name].square().mean().sqrt()), name


@every_reduction
def test_autocast_changes_products_alone(reduction, unread):
    """What is summed up in fp32 is so in autocast, in the backward, too."""
    extra_ids = EXTRA["both"]
    options = {"labels": labels_of(extra_ids), "extra_ids": extra_ids, "reduction": reduction}
    of_16_bits = inputs_of(extra_ids, dtype=BF16)
    with torch.autocast(of_16_bits["hidden"].device.type, BF16):
        found = run(ours, of_16_bits, dtype=FP32, **options)
    expected = run(ours, of_16_bits, **options)
    assert found["dbias"].dtype == FP32
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


def test_hidden_states_of_autocast_beside_a_weight_of_fp32():
    inputs = inputs_of()
    hidden = inputs["hidden"].detach().to(BF16).requires_grad_()
    with torch.autocast(hidden.device.type, BF16):
        loss = ours(hidden, inputs["weight"], inputs["bias"], None, labels=labels_of())
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, inputs["weight"].grad.dtype) == (FP32, BF16, FP32)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_learnt_rows_of_fp32_beside_a_frozen_weight_of_bf16(impl):
    extra_ids = EXTRA["both"]
    inputs = inputs_of(extra_ids, dtype=BF16, frozen=("weight", "bias"))
    inputs["extra_weight"] = inputs["extra_weight"].detach().float().requires_grad_()
    found = check(inputs, labels=labels_of(extra_ids), extra_ids=extra_ids, impl=impl)
    assert found["dextra_weight"].dtype == FP32


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_default_device_is_not_that_of_numbers(impl):
    inputs = extra((5, 6), 2)
    expected = linear_cross_entropy(**inputs, impl=impl)
    with torch.device("meta"):
        assert torch.equal(linear_cross_entropy(**inputs, impl=impl), expected)


def test_an_impl_of_other_ops_leaves_it_alone():
    inputs, labels = inputs_of(), labels_of()
    expected = ours(*inputs.values(), labels=labels)
    with ff.use_impl("triton"):
        assert torch.equal(ours(*inputs.values(), labels=labels), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (tensors(hidden=[1.0]), TypeError, "hidden: expected a tensor, got list"),
        (tensors(hidden=torch.tensor(1.0)), ValueError, "hidden: expected shape"),
        (tensors(weight=None), TypeError, "weight: expected a tensor"),
        (tensors(weight=torch.ones(5, 4)), ValueError, r"weight: .*\(5, 3\) for hidden of shape"),
        (tensors(weight=torch.ones(3)), ValueError, "weight: expected shape"),
        (tensors(weight=torch.ones(0, 3)), ValueError, "weight: expected at least one row"),
        (tensors(weight=torch.ones(5, 3).double()), TypeError, "weight: expected hidden's dtype"),
        (tensors(bias=torch.ones(3)), ValueError, r"bias: expected shape \(5,\) for hidden of"),
        (tensors(bias=torch.ones(5).double()), TypeError, "bias: expected hidden's dtype"),
        (tensors(labels=torch.zeros(4)), TypeError, "labels: expected integers"),
        (tensors(labels=torch.zeros(3).long()), ValueError, r"labels: expected shape \(4,\)"),
        (tensors(reduction="max"), ValueError, "reduction: expected one of mean, sum, none; got"),
        (tensors(ignore_index=None), TypeError, "ignore_index: expected an int, got None"),
        (tensors(chunk_bytes=0), ValueError, "chunk_bytes: expected at least 1, got 0"),
        (tensors(chunk_bytes=1.5), TypeError, "chunk_bytes: expected an int, got 1.5"),
        (tensors(impl="triton"), ValueError, "impl: expected one of auto, torch, reference"),
        (tensors(extra_ids=(1,)), ValueError, "extra_weight, extra_ids: expected both or neither"),
        (tensors(extra_weight=torch.ones(1, 3)), ValueError, "extra_ids: expected both or neither"),
        (extra((1, 1)), ValueError, r"extra_ids: expected each id >= 0 and once, got \[1, 1\]"),
        (extra((-1,)), ValueError, "extra_ids: expected each id >= 0 and once"),
        (extra((6,)), ValueError, r"extra_ids: .* to be 5, 6, ... in this order; got \[6\]"),
        (extra((6, 5)), ValueError, "extra_ids: expected those from weight's 5 on to be 5, 6"),
        (extra(torch.tensor([6])), ValueError, "extra_ids: expected those from"),
        (extra(torch.tensor([1.0])), TypeError, "extra_ids: expected integers"),
        (extra((1.0,)), TypeError, "extra_ids: expected an int, got 1.0"),
        (
            tensors(extra_weight=torch.ones(1, 3), extra_ids=5),
            TypeError,
            "extra_ids: expected a tensor or numbers, got 5",
        ),
        (extra((1,), 2), ValueError, "extra_ids: expected 2 numbers, got 1"),
        (extra(torch.tensor([1]), 2), ValueError, r"extra_ids: expected shape \(2,\)"),
        (extra((), 0), ValueError, "extra_weight: expected 1 to 4 rows"),
        (extra(range(5)), ValueError, "extra_weight: expected 1 to 4 rows, .* got 5"),
        (
            tensors(extra_weight=torch.ones(1, 4), extra_ids=(1,)),
            ValueError,
            r"extra_weight: expected shape \(1, 3\) for hidden of shape",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.cpu
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    ("label", "extra_ids", "last"),
    [(5, (), 4), (-1, (), 4), (2**32 + 1, (), 4), (7, (2, 5, 6), 6), (5, (2,), 4), (-99, (5,), 5)],
)
def test_labels_without_logits(label, extra_ids, last, impl):
    labels = torch.tensor([0, -100, label, 1])
    arguments = extra(extra_ids, labels=labels) if extra_ids else tensors(labels=labels)
    message = f"labels: expected -100 or 0 to {last}, got {label}"
    with pytest.raises(IndexError, match=message):
        linear_cross_entropy(**arguments, impl=impl)


@pytest.mark.cpu
def test_no_label_of_8_bits_is_taken_for_a_negative_one():
    labels = torch.tensor([0, 256 - 100, 1, 2], dtype=torch.uint8)
    with pytest.raises(IndexError, match="labels: expected -100 or 0 to 4, got 156"):
        linear_cross_entropy(**tensors(labels=labels))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("label", "extra_ids"), [(5, ()), (6, (2, 5)), (5, (2,)), (6, (2,)), (-1, (2, 5)), (-1, ())]
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_labels_without_logits_that_are_not_read(impl, label, extra_ids, unread):
    """No other logit is taken for theirs: an index is out of range."""
    labels = torch.tensor([0, -100, label, 1])
    arguments = extra(extra_ids, labels=labels) if extra_ids else tensors(labels=labels)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(**arguments, impl=impl)


def test_an_extended_id_at_its_loss():
    """Against numbers: of four equal logits each has the loss log 4."""
    weight, hidden = torch.zeros(3, 2), torch.ones(3, 2)
    loss = linear_cross_entropy(
        hidden,
        weight,
        None,
        torch.tensor([0, 3, -100]),
        extra_weight=torch.zeros(1, 2),
        extra_ids=(3,),
        reduction="none",
    )
    torch.testing.assert_close(loss, torch.tensor([math.log(4), math.log(4), 0.0]))
