"""linear_cross_entropy: no work, memory or waiting that nobody needs."""

import functools

import pytest
import torch
from attention_contract import no_host_sync, peak_bytes
from cross_entropy_cases import (
    BF16,
    CHUNK_BYTES,
    EXTRA,
    FP32,
    INPUTS,
    ROWS,
    VOCAB,
    WIDTH,
    every_dtype,
    every_reduction,
    inputs_of,
    labels_of,
    ours,
)
from torch.utils.flop_counter import FlopCounterMode

from flamingo_fast.ops.linear_cross_entropy import linear_cross_entropy
from flamingo_fast.testing.inputs import random_tensor


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.cpu
def test_no_work_for_gradients_that_nobody_wants():
    labels = labels_of()
    product = 2 * int((labels >= 0).sum()) * WIDTH * VOCAB

    def work(frozen, reduction="mean", rows_labels=labels):
        inputs = inputs_of(bias=False, frozen=frozen)
        losses = []
        call = functools.partial(ours, labels=rows_labels, reduction=reduction)
        forward = flops(lambda: losses.append(call(*inputs.values()).sum()))
        return forward, flops(losses[0].backward) if losses[0].requires_grad else 0

    assert work(INPUTS) == (product, 0)
    with torch.no_grad():
        assert work(()) == (product, 0)
    assert work(("weight",)) == (2 * product, 0)
    assert work(("weight",), "none") == (2 * product, 0)
    assert work(("hidden",)) == (2 * product, 0)
    assert work(()) == (3 * product, 0)
    assert work((), "none") == (product, 3 * product)
    all_count = labels.clamp(min=0)
    assert work(INPUTS, rows_labels=all_count)[0] == 2 * ROWS * WIDTH * VOCAB


def kept_shapes(frozen=(), extra_ids=(), reduction="mean", dtype=FP32):
    inputs = inputs_of(extra_ids, dtype=dtype, frozen=frozen)
    kept = []

    def keep(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    options = {"labels": labels_of(extra_ids), "extra_ids": extra_ids, "reduction": reduction}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(*inputs.values(), **options)
    return kept


def test_what_is_kept():
    """Gradients, of the frozen nothing, neither weights nor hidden states."""
    ids = EXTRA["both"]
    count, hidden = ((), torch.int64), ((ROWS, WIDTH), BF16)
    extra = ((len(ids), WIDTH), FP32)
    assert kept_shapes(("weight", "bias"), ids, "mean", BF16) == [count, hidden, extra]
    assert kept_shapes(("weight", "bias"), (), "sum", BF16) == [hidden]
    assert kept_shapes(("weight", "bias"), (), "none", BF16) == [hidden]
    assert kept_shapes(INPUTS[:3], ids, "sum", BF16) == [extra]
    assert kept_shapes(INPUTS, ids) == []


@pytest.mark.cpu
@every_reduction
@pytest.mark.parametrize("extra_ids", [(), (3, 4000)], ids=["", "extra"])
@every_dtype
def test_logits_are_never_all_in_memory(dtype, extra_ids, reduction):
    rows, width, vocab, chunk_bytes = 256, 8, 4000, 1 << 20
    weight = random_tensor((vocab, width), dtype, seed=0)
    hidden = random_tensor((rows, width), dtype, seed=1, requires_grad=True)
    extra = random_tensor((2, width), FP32, seed=2, requires_grad=True) if extra_ids else None
    for labels in (torch.arange(rows), torch.arange(rows).where(torch.arange(rows) % 2 > 0, -100)):
        losses = []

        def forward(losses=losses, labels=labels):
            loss = linear_cross_entropy(
                hidden,
                weight,
                None,
                labels,
                extra_weight=extra,
                extra_ids=extra_ids or None,
                reduction=reduction,
                chunk_bytes=chunk_bytes,
            )
            losses.append(loss.sum())

        # Beside the chunk: rows, a few copies of what has D columns or E, some of one row; and the
        # weight as a product of 16 bits may lay it out.
        small = 6 * hidden.numel() * 4 + 4 * rows * 8 * 2 + 6 * vocab * 4 + 2 * weight.nbytes
        if extra_ids:
            small += 2 * vocab * 4
        assert chunk_bytes // 2 < peak_bytes(forward) <= chunk_bytes + small
        again = peak_bytes(losses[0].backward)
        recomputes = reduction == "none" and bool(extra_ids)
        assert again <= small + (chunk_bytes if recomputes else 0)
    assert chunk_bytes + small < rows * vocab * dtype.itemsize


@pytest.mark.cpu
def test_memory_of_a_weight_that_learns():
    """Its gradient, and no logits beside it."""
    rows, width, vocab, chunk_bytes = 256, 8, 4000, 1 << 18
    weight = random_tensor((vocab, width), seed=0, requires_grad=True)
    hidden = random_tensor((rows, width), seed=1, requires_grad=True)
    losses = []
    options = {"labels": torch.arange(rows), "chunk_bytes": chunk_bytes}
    forward = peak_bytes(lambda: losses.append(ours(hidden, weight, None, None, **options)))
    backward = peak_bytes(lambda: torch.autograd.grad(losses[0], (hidden, weight)))
    small = 8 * hidden.nbytes + vocab * 4
    assert weight.nbytes < forward <= weight.nbytes + chunk_bytes + small
    assert weight.nbytes < backward <= weight.nbytes + small


@every_reduction
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("extra_ids", [(), EXTRA["both"]], ids=["", "both"])
@pytest.mark.parametrize("in_a_tensor", [False, True], ids=["tuple", "tensor"])
def test_no_host_sync(in_a_tensor, extra_ids, impl, reduction):
    inputs = {
        name: None if tensor is None else tensor.detach().to("meta").requires_grad_()
        for name, tensor in inputs_of(extra_ids).items()
    }
    ids = torch.empty(len(extra_ids), dtype=torch.int64, device="meta")
    with no_host_sync():
        loss = linear_cross_entropy(
            *list(inputs.values())[:3],
            torch.empty(ROWS, dtype=torch.int64, device="meta"),
            extra_weight=inputs["extra_weight"],
            extra_ids=(ids if in_a_tensor else extra_ids) if extra_ids else None,
            reduction=reduction,
            chunk_bytes=CHUNK_BYTES,
            impl=impl,
        )
        loss.backward(torch.empty_like(loss))
    for tensor in inputs.values():
        assert tensor is None or tensor.grad.shape == tensor.shape
