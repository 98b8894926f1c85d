"""linear_cross_entropy: the loss of hidden states and labels; logits are there a few rows at once.

N rows, D width, V rows of the weight, E rows beside it. As in Liger-Kernel and in
`torch.nn.functional.linear_cross_entropy` (2.14), the forward makes the gradients while it has the
logits, softmax - onehot of them, and the backward multiplies by the loss's. Here there are rows
beside the weight, too, and on a CPU ignored rows cost nothing.
"""

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from flamingo_fast.layout import values_are_at_hand
from flamingo_fast.ops.checks import (
    check_floating,
    check_integer_tensor,
    check_parameter,
    check_rows,
    one_of,
)
from flamingo_fast.ops.dispatch import (
    apply,
    autocast_dtype,
    choose_impl,
    differentiable_once,
    register_op,
)

REDUCTIONS = ("mean", "sum", "none")
_IMPLS = ("auto", "torch", "reference")
# A GPU reads weight again for every chunk, and wants some 500 rows or more in each.
_CHUNK_BYTES = {"cpu": 1 << 26, "gpu": 1 << 28}


class _Vocabulary(NamedTuple):
    """What makes logits, in the dtype of the products; extra_weight and extra_ids may be None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    extra_weight: torch.Tensor | None
    extra_ids: torch.Tensor | None

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        extra_weight: torch.Tensor | None,
        extra_ids: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> "_Vocabulary":
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if extra_weight is not None and extra_ids is not None:
            extra_weight = extra_weight.to(dtype)
            # A bias takes the rows that are replaced out of the softmax in the product itself.
            rows = torch.arange(weight.shape[0], device=weight.device)
            bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
            bias = bias.masked_fill((rows[:, None] == extra_ids).any(1), -math.inf)
        return cls(weight, bias, extra_weight, extra_ids)

    def columns_of(self, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Which of V + E columns labels (N,) are in; any where not valid.

        One that is in none gets an index out of range: on a GPU gather then fails, as cross_entropy
        does.
        """
        columns = labels.where(valid, 0)
        if self.extra_weight is None or self.extra_ids is None:
            return columns
        num_rows, num_extra = self.weight.shape[0], self.extra_weight.shape[0]
        has_row = (columns >= 0) & (columns < num_rows)
        columns = columns.where(has_row, num_rows + num_extra)
        matches = labels[:, None].eq(self.extra_ids)
        # Of bool tensors there is no argmax.
        of_extra = num_rows + matches.int().argmax(1)
        return of_extra.where(matches.any(1), columns)

    def split(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Columns of V + E as those of V and of E, 0 where of the others, and whether of E."""
        is_extra = columns >= self.weight.shape[0]
        of_extra = (columns - self.weight.shape[0]).where(is_extra, 0)
        return columns.masked_fill(is_extra, 0), of_extra, is_extra


def _log_probs(
    hidden: torch.Tensor, vocabulary: _Vocabulary, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the weight's rows and of those beside it."""
    logits = F.linear(hidden, vocabulary.weight, vocabulary.bias)
    if logits.device.type == "cpu":
        # Elsewhere log_softmax reads 16 bits itself; here it would keep them and convert as well.
        logits = logits.to(wide)
    log_probs = torch.log_softmax(logits, 1, dtype=wide)
    if vocabulary.extra_weight is None:
        return log_probs, None
    largest = logits.amax(1, keepdim=True).to(wide)
    del logits
    extra = F.linear(hidden, vocabulary.extra_weight).to(wide)
    # All relative to the largest of all logits, or where those are far from 0 the digits of their
    # differences are lost. The largest of log_probs is minus the logarithm of a sum of exponentials
    # relative to the largest of the weight's rows.
    largest_of_all = torch.maximum(largest, extra.amax(1, keepdim=True))
    extra.sub_(largest_of_all)
    log_sum = largest - largest_of_all - log_probs.amax(1, keepdim=True)
    log_sum_of_all = torch.logaddexp(log_sum, extra.logsumexp(1, keepdim=True))
    return log_probs.add_(log_sum - log_sum_of_all), extra.sub_(log_sum_of_all)


def _losses(
    log_probs: torch.Tensor,
    extra_log_probs: torch.Tensor | None,
    columns: torch.Tensor,
    vocabulary: _Vocabulary,
) -> torch.Tensor:
    """(rows, 1); columns are (rows, 1), too."""
    if extra_log_probs is None:
        return log_probs.gather(1, columns).neg_()
    columns, extra_columns, is_extra = vocabulary.split(columns)
    of_extra = extra_log_probs.gather(1, extra_columns)
    return of_extra.where(is_extra, log_probs.gather(1, columns)).neg_()


class _Gradients:
    """What the rows of one chunk after another add to; None is what nobody wants.

    Arguments:
        wanted: of hidden, weight, bias and extra_weight.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        vocabulary: _Vocabulary,
        wanted: Sequence[bool],
        wide: torch.dtype,
    ) -> None:
        self.vocabulary = vocabulary
        self.hidden = hidden.new_zeros(hidden.shape) if wanted[0] else None
        self.sums = [
            tensor.new_zeros(tensor.shape, dtype=wide) if tensor is not None and is_wanted else None
            for tensor, is_wanted in zip(vocabulary[:3], wanted[1:], strict=True)
        ]

    @property
    def are_wanted(self) -> bool:
        return any(each is not None for each in (self.hidden, *self.sums))

    def add(
        self,
        rows: Any,
        hidden: torch.Tensor,
        log_probs: torch.Tensor,
        extra_log_probs: torch.Tensor | None,
        columns: torch.Tensor,
        factors: torch.Tensor | None,
    ) -> None:
        """The memory of the log-probabilities is used again.

        Arguments:
            rows: which of all rows these are.
            columns: (rows, 1)
            factors: (rows, 1), of each row's gradient. They multiply what has D columns, not V.
        """
        weight, _, extra_weight, _ = self.vocabulary
        dweight, dbias, dextra = self.sums
        minus_one = log_probs.new_full(columns.shape, -1)
        # What is None here is not used below: mypy can't tell.
        extra_columns: Any = None
        minus_one_of_extra: Any = None
        if extra_log_probs is not None:
            columns, extra_columns, is_extra = self.vocabulary.split(columns)
            minus_one_of_extra = minus_one.where(is_extra, 0)
            minus_one = minus_one.masked_fill_(is_extra, 0)
        wide_dlogits = log_probs.exp_().scatter_add_(1, columns, minus_one)
        if dbias is not None:
            dbias += wide_dlogits.sum(0) if factors is None else (factors.mT @ wide_dlogits)[0]
        dlogits = wide_dlogits.to(weight.dtype)
        scaled = hidden if factors is None else (hidden * factors).to(hidden.dtype)
        dhidden: Any = None
        if self.hidden is not None:
            dhidden = dlogits @ weight
        if dweight is not None:
            _add_product(dweight, dlogits.mT, scaled)
        if extra_log_probs is not None and extra_weight is not None:
            dlogits = extra_log_probs.exp_().scatter_add_(1, extra_columns, minus_one_of_extra)
            dlogits = dlogits.to(weight.dtype)
            if self.hidden is not None:
                dhidden = torch.addmm(dhidden, dlogits, extra_weight)
            if dextra is not None:
                _add_product(dextra, dlogits.mT, scaled)
        if self.hidden is not None:
            dhidden = dhidden if factors is None else dhidden * factors
            self.hidden[rows] = dhidden.to(self.hidden.dtype)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        # Not addmm_, which PyTorch's counter of FLOPs misses.
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right


def _walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    extra_weight: torch.Tensor | None,
    extra_ids: torch.Tensor | None,
    labels: torch.Tensor,
    dlosses: torch.Tensor | None,
    ignore_index: int,
    chunk_bytes: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Losses (N,), 0 of ignored rows; gradients of their sum, as `wanted` in `_Gradients`.

    Arguments:
        dlosses: (N,), for gradients of the sum of losses times these.
        dtype: of matrix products.

    Returns:
        The losses and gradients of weights are fp32 (fp64 of fp64).
    """
    wide = torch.promote_types(dtype, torch.float32)
    vocabulary = _Vocabulary.of(weight, bias, extra_weight, extra_ids, dtype)
    gradients = _Gradients(hidden, vocabulary, wanted, wide)
    losses = hidden.new_zeros(hidden.shape[0], dtype=wide)
    valid = labels != ignore_index
    columns = vocabulary.columns_of(labels, valid)
    # Only where the number of ignored rows is known without waiting for it do they cost nothing.
    there = valid.nonzero()[:, 0] if values_are_at_hand(valid) else None
    factors = None
    if dlosses is not None:
        factors = dlosses.where(valid, 0)
    elif there is None:
        factors = valid.to(wide)
    if there is not None and there.shape[0] == hidden.shape[0]:
        there = None
    count = hidden.shape[0] if there is None else there.shape[0]
    # Logits and log-probabilities at once. Logits and gradients of 16 bits are there, too, but
    # beside one of the two.
    row_bytes = 2 * wide.itemsize * vocabulary.weight.shape[0]
    most = max(1, chunk_bytes // row_bytes)
    # All chunks of about a size.
    size = math.ceil(count / math.ceil(count / most)) if count else 1
    for start in range(0, count, size):
        stop = min(start + size, count)
        rows = slice(start, stop) if there is None else there[start:stop]
        chunk, at = hidden[rows].to(dtype), columns[rows, None]
        log_probs, extra_log_probs = _log_probs(chunk, vocabulary, wide)
        losses[rows] = _losses(log_probs, extra_log_probs, at, vocabulary)[:, 0]
        if gradients.are_wanted:
            chunk_factors = None if factors is None else factors[rows, None]
            gradients.add(rows, chunk, log_probs, extra_log_probs, at, chunk_factors)
        # Or they would be there beside those of the next chunk.
        del log_probs, extra_log_probs
    return [losses.where(valid, 0), gradients.hidden, *gradients.sums]


def _walk_with_all(*arguments: Any) -> list[torch.Tensor]:
    """As an op returns them: of no elements is what nobody wants."""
    results = _walk(*arguments)
    return [arguments[0].new_empty(0) if each is None else each for each in results]


def _fake_walk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    extra_weight: torch.Tensor | None,
    *others: Any,
) -> list[torch.Tensor]:
    *_, dtype, wanted = others
    wide = torch.promote_types(dtype, torch.float32)
    return [
        hidden.new_empty(hidden.shape[0], dtype=wide),
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        *(
            hidden.new_empty(each.shape, dtype=wide)
            if each is not None and is_wanted
            else hidden.new_empty(0)
            for each, is_wanted in zip((weight, bias, extra_weight), wanted[1:], strict=True)
        ),
    ]


_walk_op = register_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor? extra_weight, "
    "Tensor? extra_ids, Tensor labels, Tensor? dlosses, int ignore_index, int chunk_bytes, "
    "ScalarType dtype, bool[] wanted) -> Tensor[]",
    _walk_with_all,
    _fake_walk,
)


def _losses_and_gradients(*arguments: Any) -> list[torch.Tensor | None]:
    """`_walk`, which the compiler sees as one op: it would unroll the loop over chunks."""
    if not torch.compiler.is_compiling():
        return _walk(*arguments)
    losses, *gradients = _walk_op(*arguments)
    *_, wanted = arguments
    there = [
        is_wanted and tensor is not None
        for tensor, is_wanted in zip(arguments[:4], wanted, strict=True)
    ]
    return [
        losses,
        *(each if is_there else None for each, is_there in zip(gradients, there, strict=True)),
    ]


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class _LinearCrossEntropyFn(torch.autograd.Function):
    """`hidden` is (N, D), `labels` (N,) int64; the last are ignore_index, chunk_bytes and dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        extra_weight: torch.Tensor | None,
        extra_ids: torch.Tensor | None,
        labels: torch.Tensor,
        reduction: str,
        *options: Any,
    ) -> torch.Tensor:
        needs = list(ctx.needs_input_grad[:4])
        inputs = (hidden, weight, bias, extra_weight)
        ctx.options = options
        # Gradients of weights sum over rows, which the backward may scale one by one.
        ctx.recomputes = reduction == "none" and any(needs[1:])
        wanted = [False] * 4 if ctx.recomputes else needs
        results: list[Any] = _losses_and_gradients(
            *inputs, extra_ids, labels, None, *options, wanted
        )
        losses, *gradients = results
        if ctx.recomputes:
            ctx.save_for_backward(*inputs, extra_ids, labels)
            return losses
        count = (labels != options[0]).sum() if reduction == "mean" else None
        # Of the inputs themselves only dtypes are wanted.
        ctx.dtypes = [None if each is None else each.dtype for each in inputs]
        ctx.save_for_backward(count, *gradients)
        if reduction == "none":
            return losses
        return losses.sum() if count is None else losses.sum() / count

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients: list[torch.Tensor | None]
        if ctx.recomputes:
            inputs = ctx.saved_tensors
            needs = list(ctx.needs_input_grad[:4])
            with _without_autocast(dloss.device):
                _, *sums = _losses_and_gradients(*inputs, dloss, *ctx.options, needs)
            gradients = [
                None if each is None else each.to(tensor.dtype)
                for each, tensor in zip(sums, inputs[:4], strict=True)
            ]
        else:
            count, *saved = ctx.saved_tensors
            # Without labels the loss is NaN and the gradients are 0, as of cross_entropy.
            scale = dloss if count is None else dloss / count.clamp(min=1)
            # With dimensions, so that 16 bits times it is fp32: a scale of fp16 training may be
            # no number of fp16.
            scale = scale.reshape(-1, 1)
            gradients = [
                None if each is None else (each * scale).to(dtype).reshape(each.shape)
                for each, dtype in zip(saved, ctx.dtypes, strict=True)
            ]
        return (*gradients, None, None, None, None, None, None)


def _reference(
    hidden: torch.Tensor,
    vocabulary: _Vocabulary,
    labels: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    """With all logits at once."""
    hidden = hidden.to(vocabulary.weight.dtype)
    logits = F.linear(hidden, vocabulary.weight, vocabulary.bias)
    if vocabulary.extra_weight is not None:
        logits = torch.cat([logits, F.linear(hidden, vocabulary.extra_weight)], 1)
        valid = labels != ignore_index
        # Not ignore_index, which may be one of these columns.
        ignore_index = -100
        labels = vocabulary.columns_of(labels, valid).where(valid, ignore_index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    extra_weight: torch.Tensor | None = None,
    extra_ids: torch.Tensor | Sequence[int] | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """cross_entropy(linear(hidden, weight, bias), labels), without all logits in memory.

    A few tokens' embeddings may be learnt beside a frozen vocabulary, as that of <EOC> is
    (Flamingo, section 2.4): the logits of the ids `extra_ids` are products with `extra_weight`.

    Gradients, of what requires one, are made in the forward; with reduction="none" those of
    weights in the backward, which computes the logits again. There is no double backward.

    Arguments:
        hidden: (..., D), fp32, fp16, bf16 or fp64.
        weight: (V, D) of hidden's dtype; bias: (V,) of that dtype, or None. Inside autocast the
            products are in its dtype, whatever theirs.
        labels: (...), integers: what each row is to predict (shift them before).
        extra_weight: (E, D) of any dtype, E < V; without a bias.
        extra_ids: (E,), integers, or E numbers, which a call copies to the device (not while a CUDA
            graph is captured). An id below V has its logit from extra_weight instead; those from V
            on extend the vocabulary and are V, V + 1, ... in this order.
        ignore_index: the label of rows that don't count.
        reduction: "mean" (over rows that count; NaN if there are none), "sum" or "none".
        chunk_bytes: how much memory logits may take at once; at least those of one row are there.
            None: 64 MiB on a CPU, else 256.
        impl: "auto", "torch" or "reference" (all logits at once).

    Returns:
        Scalar, or of labels' shape, fp32 (fp64 of fp64).

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        IndexError: labels that have no logits. On a GPU values are not checked here; there an
            index that is out of range fails in PyTorch's kernel, as of cross_entropy.
    """
    check_rows("hidden", hidden)
    check_floating("weight", weight)
    width = hidden.shape[-1]
    check_parameter("weight", weight, hidden, [(*weight.shape[:1], width)], of="hidden")
    vocab_size = weight.shape[0]
    if vocab_size == 0:
        raise ValueError(f"weight: expected at least one row, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_parameter("bias", bias, hidden, [(vocab_size,)], of="hidden")
    dtype = autocast_dtype(weight)
    if dtype is None:
        dtype = weight.dtype
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise TypeError(
                    f"{name}: expected hidden's dtype {hidden.dtype}, got {tensor.dtype}"
                )
    check_integer_tensor("labels", labels, tuple(hidden.shape[:-1]), hidden)
    one_of("reduction", reduction, REDUCTIONS)
    _check_int("ignore_index", ignore_index)
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "gpu"]
    _check_int("chunk_bytes", chunk_bytes)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected at least 1, got {chunk_bytes}")
    if (extra_weight is None) != (extra_ids is None):
        raise ValueError("extra_weight, extra_ids: expected both or neither")
    ids = None
    if extra_weight is not None and extra_ids is not None:
        ids = _check_extra(extra_weight, extra_ids, hidden, vocab_size)
    rows, row_labels = hidden.reshape(-1, width), labels.reshape(-1).long()
    _check_labels(row_labels, vocab_size, ids, ignore_index)
    impl = choose_impl(impl, hidden, known=_IMPLS)
    with _without_autocast(hidden.device):
        if impl == "reference":
            vocabulary = _Vocabulary.of(weight, bias, extra_weight, ids, dtype)
            loss = _reference(rows, vocabulary, row_labels, ignore_index, reduction)
        else:
            inputs = (rows, weight, bias, extra_weight, ids, row_labels)
            options = (reduction, ignore_index, chunk_bytes, dtype)
            loss = apply(_LinearCrossEntropyFn, *inputs, *options)
    return loss.view(labels.shape) if reduction == "none" else loss


def _check_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")


def _check_extra(
    extra_weight: torch.Tensor,
    extra_ids: torch.Tensor | Sequence[int],
    hidden: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """extra_ids as int64, on hidden's device; values are checked if they are at hand."""
    check_floating("extra_weight", extra_weight)
    shape = (*extra_weight.shape[:1], hidden.shape[-1])
    check_parameter("extra_weight", extra_weight, hidden, [shape], of="hidden")
    num_extra = extra_weight.shape[0]
    if not 0 < num_extra < vocab_size:
        raise ValueError(
            f"extra_weight: expected 1 to {vocab_size - 1} rows, fewer than weight; got {num_extra}"
        )
    if isinstance(extra_ids, torch.Tensor):
        check_integer_tensor("extra_ids", extra_ids, (num_extra,), hidden)
        ids = extra_ids.long()
        values = ids.tolist() if values_are_at_hand(ids) else None
    elif not isinstance(extra_ids, Iterable):
        raise TypeError(f"extra_ids: expected a tensor or numbers, got {extra_ids!r}")
    else:
        values = list(extra_ids)
        for each in values:
            _check_int("extra_ids", each)
        if len(values) != num_extra:
            raise ValueError(f"extra_ids: expected {num_extra} numbers, got {len(values)}")
        ids = torch.tensor(values, device="cpu").to(hidden.device, non_blocking=True)
    if values is not None:
        beyond = [each for each in values if each >= vocab_size]
        if beyond != list(range(vocab_size, vocab_size + len(beyond))):
            raise ValueError(
                f"extra_ids: expected those from weight's {vocab_size} on to be {vocab_size}, "
                f"{vocab_size + 1}, ... in this order; got {values}"
            )
        if min(values) < 0 or len(set(values)) < len(values):
            raise ValueError(f"extra_ids: expected each id >= 0 and once, got {values}")
    return ids


def _check_labels(
    labels: torch.Tensor, vocab_size: int, extra_ids: torch.Tensor | None, ignore_index: int
) -> None:
    if not values_are_at_hand(labels):
        return
    num_ids = vocab_size
    if extra_ids is not None:
        num_ids += int((extra_ids >= vocab_size).sum())
    wrong = ((labels < 0) | (labels >= num_ids)) & (labels != ignore_index)
    if wrong.any():
        raise IndexError(
            f"labels: expected {ignore_index} or 0 to {num_ids - 1}, got {int(labels[wrong][0])}"
        )
