"""Inputs of linear_cross_entropy, and what its tests compare with."""

import functools

import pytest
import torch
import torch.nn.functional as F

from flamingo_fast.ops.linear_cross_entropy import linear_cross_entropy
from flamingo_fast.testing.compare import assert_close_to_oracle, outputs_and_gradients
from flamingo_fast.testing.inputs import random_tensor

FP32, BF16 = torch.float32, torch.bfloat16
ROWS, WIDTH, VOCAB = 45, 16, 50
INPUTS = ("hidden", "weight", "bias", "extra_weight")
EXTRA = {
    "": (),
    "replacing": (7, 0),
    "extending": (VOCAB, VOCAB + 1),
    "both": (VOCAB, 7, VOCAB + 1, VOCAB - 1),
}
# Of 45 rows, or of the 30 of them that count, no divisor: chunks of 7 at most.
CHUNK_BYTES = 7 * 8 * VOCAB + 100
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
every_extra = pytest.mark.parametrize("extra_ids", EXTRA.values(), ids=EXTRA.keys())
REDUCTIONS = ("mean", "sum", "none")
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def inputs_of(extra_ids=(), bias=True, dtype=FP32, frozen=(), rows=ROWS):
    shapes = {
        "hidden": (rows, WIDTH),
        "weight": (VOCAB, WIDTH),
        "bias": (VOCAB,) if bias else None,
        "extra_weight": (len(extra_ids), WIDTH) if extra_ids else None,
    }
    return {
        name: None
        if shape is None
        else random_tensor(shape, dtype, seed=seed, requires_grad=name not in frozen)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def labels_of(extra_ids=(), rows=ROWS):
    """Each third is ignored, every id of extra_ids is there."""
    generator = torch.Generator("cpu").manual_seed(5)
    num_ids = max(VOCAB, *extra_ids, 0) + (max(extra_ids, default=0) >= VOCAB)
    labels = torch.randint(num_ids, (rows,), generator=generator, device="cpu")
    labels[::3] = -100
    labels[1 : 1 + 3 * len(extra_ids) : 3] = torch.tensor(extra_ids, dtype=torch.int64)
    return labels.to(torch.get_default_device())


def ours(hidden, weight, bias, extra_weight, *, labels, extra_ids=(), **options):
    return linear_cross_entropy(
        hidden,
        weight,
        bias,
        labels,
        extra_weight=extra_weight,
        extra_ids=extra_ids or None,
        **({"chunk_bytes": CHUNK_BYTES} | options),
    )


def plain(hidden, weight, bias, extra_weight, *, labels, extra_ids=(), **options):
    """One weight of all ids."""
    if extra_weight is not None:
        extra_weight = extra_weight.to(weight.dtype)
    row_of = {token: row for row, token in enumerate(extra_ids)}
    num_ids = max(VOCAB, *(token + 1 for token in extra_ids), 0)
    columns = []
    logits = F.linear(hidden, weight, bias)
    extra_logits = None if extra_weight is None else F.linear(hidden, extra_weight)
    for token in range(num_ids):
        row = row_of.get(token)
        columns.append(logits[:, token] if row is None else extra_logits[:, row])
    logits = torch.stack(columns, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, FP32)), labels, **options)


def run(function, inputs, reduction="mean", dtype=None, dloss=1.7, **options):
    # Those of reduction="none" differ from row to row.
    shape = inputs["hidden"].shape[:1] if reduction == "none" else ()
    douts = dloss * (random_tensor(shape, torch.float64, seed=9) if shape else torch.ones(()))
    function = functools.partial(function, reduction=reduction, **options)
    return outputs_and_gradients(function, inputs, ("loss",), (douts,), dtype)


def check(inputs, function=ours, **options):
    """The three-way rule."""
    found = run(function, inputs, **options)
    for name in ("impl", "chunk_bytes"):
        options.pop(name, None)
    eager = run(plain, inputs, **options)
    oracle = run(plain, inputs, dtype=torch.float64, **options)
    assert_close_to_oracle(found, eager, oracle)
    return found


def tensors(**change):
    inputs = {"hidden": torch.ones(4, 3), "weight": torch.ones(5, 3), "bias": None}
    return inputs | {"labels": torch.zeros(4, dtype=torch.int64)} | change


def extra(ids, rows=None, **change):
    weight = torch.ones(len(ids) if rows is None else rows, 3)
    return tensors(extra_weight=weight, extra_ids=ids, **change)
