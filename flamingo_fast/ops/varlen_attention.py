"""Attention by the variable-length kernels of PyTorch, flash-attn and xformers, as baselines.

Their sequences are the media: the rows that attend to a medium meet its tokens where these lie in k
and v, without a mask or a copy. Rows that attend to nothing are sequences without keys.
"""

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from flamingo_fast.layout import MediaLayout


@dataclasses.dataclass(frozen=True)
class VarlenMetadata:
    """The B * L rows and the media_total * R keys of a batch, cut into as many sequences each.

    A medium is one sequence, of no rows if none attends to it. Its padding is the next one, a
    sequence without rows: the libraries' seqused_k would do for the forward, but not all have it,
    and their backwards refuse it or leave the gradients of the padding unwritten.

    Attributes:
        cu_seqlens_q: (sequences + 1,) int32; the rows of sequence i are
            cu_seqlens_q[i]..cu_seqlens_q[i + 1] of all, in the order of row_index if that is there.
        cu_seqlens_k: (sequences + 1,) int32; the same of the keys.
        max_seqlen_q, max_seqlen_k: rows and keys of a sequence at most.
        row_index: the layout's; (B * L,) int32 or None.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    row_index: torch.Tensor | None


def varlen_metadata(layout: MediaLayout, num_keys: int) -> VarlenMetadata:
    """Made without waiting for a GPU; whatever the layout's values are, offsets stay in bounds.

    Arguments:
        layout: of at most one medium a token.
        num_keys: tokens of a medium, the R of k and v.
    """
    batch, seqlen = layout.media_start.shape
    media_total, row_index, device = layout.media_total, layout.row_index, layout.device
    arange = functools.partial(torch.arange, dtype=torch.int32, device=device)
    has_padding = layout.media_seqlens is not None
    media = arange(media_total)
    flat = layout.cu_media[:-1, None] + layout.media_start
    attends = layout.media_end > layout.media_start
    # `of_row` is the sequence of each row, in their order, and `of_medium` that of each medium.
    # The kernels' grids end at max_seqlen_q: rows that attend to nothing are cut every L.
    if row_index is None:
        # Of each medium: rows before it that attend to nothing, its own, and its padding; of each
        # sample one more: the rows after its last medium.
        per_medium = 2 + has_padding
        of_row = (per_medium * flat + arange(batch)[:, None] + attends).flatten()
        sample = torch.searchsorted(layout.cu_media[1:], media, right=True, out_int32=True)
        of_medium = per_medium * media + sample + 1
    else:
        # Of each medium: its rows and its padding; then those that attend to nothing.
        per_medium = 1 + has_padding
        exists = attends & (flat >= 0) & (flat < media_total)
        flat = torch.where(exists, flat, media_total).flatten()[row_index]
        nothing = per_medium * media_total + arange(batch * seqlen) // max(seqlen, 1)
        of_row = torch.where(flat < media_total, per_medium * flat, nothing)
        of_medium = per_medium * media
    sequences = per_medium * media_total + batch
    valid = torch.full_like(media, num_keys)
    lengths = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
    if layout.media_seqlens is not None:
        valid = layout.media_seqlens.clamp(0, num_keys)
        lengths[of_medium + 2] = num_keys - valid
    lengths[of_medium + 1] = valid
    return VarlenMetadata(
        cu_seqlens_q=torch.searchsorted(
            of_row.clamp_(0, max(sequences - 1, 0)), arange(sequences + 1), out_int32=True
        ),
        cu_seqlens_k=lengths.cumsum(0, dtype=torch.int32),
        # 1, with fewer heads in k, FlashAttention 2 takes for one row in each sequence.
        max_seqlen_q=max(seqlen, 2),
        max_seqlen_k=num_keys,
        row_index=row_index,
    )


_INSTALL_FLASH_ATTN = (
    "pip install flash-attn --no-build-isolation, which needs a CUDA toolchain (nvcc), or "
    "pip install flash-attn-4 on Hopper and Blackwell"
)
# Module, function, what to do if it is not there, keywords that it must have.
_LIBRARIES: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "varlen": (
        "torch.nn.attention.varlen",
        "varlen_attn",
        f"PyTorch 2.11 or later has it, this is {torch.__version__}",
        ("scale",),
    ),
    "flash_attn": (
        "flash_attn",
        "flash_attn_varlen_func",
        _INSTALL_FLASH_ATTN,
        ("softmax_scale", "deterministic"),
    ),
    # Versions 2.8 bring an early one, which can't do a deterministic backward.
    "flash_attn_4": (
        "flash_attn.cute",
        "flash_attn_varlen_func",
        _INSTALL_FLASH_ATTN,
        ("max_seqlen_q", "num_splits", "deterministic"),
    ),
    "xformers": (
        "xformers.ops",
        "memory_efficient_attention",
        "pip install xformers, built for this PyTorch",
        ("attn_bias", "scale"),
    ),
}


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _import(library: str) -> str | None:
    module, name, remedy, keywords = _LIBRARIES[library]
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # A binary that was built for another PyTorch raises anything.
        first_line = str(error).partition("\n")[0]
        return f"{module} can't be imported ({type(error).__name__}: {first_line}): {remedy}"
    missing = [keyword for keyword in keywords if keyword not in _parameters(function)]
    if missing:
        return f"{module}.{name} has no argument {' or '.join(missing)}: {remedy}"
    return None


# torch.compile would look into functools.cache, and fail at the import.
@torch.compiler.assume_constant_result
def _why_missing(library: str) -> str | None:
    return _import(library)


def _function(library: str) -> Callable[..., Any]:
    reason = _why_missing(library)
    if reason is not None:
        raise RuntimeError(reason)
    module, name, *_ = _LIBRARIES[library]
    return getattr(sys.modules[module], name)


@torch.compiler.assume_constant_result
def _takes(library: str, keyword: str) -> bool:
    return keyword in _parameters(_function(library))


def _flash_attn_library(q: torch.Tensor) -> str:
    """Version 4 where it can run, otherwise 2."""
    if _why_missing("flash_attn_4") is not None:
        return "flash_attn"
    major, head_dim = torch.cuda.get_device_capability(q.device)[0], q.shape[3]
    fits = major == 9 or (major in (10, 11) and (head_dim <= 128 or head_dim == 256))
    return "flash_attn_4" if fits else "flash_attn"


def why_not(
    impl: str, q: torch.Tensor, k: torch.Tensor, layout: MediaLayout, unattended_dense: bool
) -> str | None:
    """Why `impl`, "varlen", "flash_attn" or "xformers", can't take these arguments; None if it can.

    Arguments:
        q: (B, L, H, D).
        k: (media_total, R, Hkv, D).
        unattended_dense: tokens that attend to nothing get attention to everything.
    """
    if layout.max_media_per_token > 1:
        return (
            f"the layout has up to {layout.max_media_per_token} media a token, and a sequence of "
            "its keys is of 1"
        )
    if unattended_dense:
        return 'unattended="dense" has tokens that attend to several media'
    if q.device.type != "cuda":
        return f"its kernels need a GPU and the tensors are on {q.device.type!r}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels take torch.float16 and torch.bfloat16, got {q.dtype}"
    if q.shape[3] > 256 or q.shape[3] % 8:
        return f"its kernels take a head_dim up to 256 that is a multiple of 8, got {q.shape[3]}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"its kernels need compute capability 8.0 or later, this GPU has {capability}"
    missing = _why_missing(_flash_attn_library(q) if impl == "flash_attn" else impl)
    if missing is not None:
        return missing
    if impl == "varlen" and q.shape[2] != k.shape[2] and not _takes("varlen", "enable_gqa"):
        return (
            "before PyTorch 2.12 it takes as many heads in k as in q, "
            f"got {k.shape[2]} and {q.shape[2]}"
        )
    return None


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """The kernels read 16 bytes at once, and trust that these don't straddle."""
    if torch.compiler.is_compiling():  # It can't trace storage_offset.
        return rows.contiguous()
    *outer, last = rows.stride()
    if last == 1 and not any(stride % 8 for stride in (*outer, rows.storage_offset())):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _by_sequence(
    attend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    writes_zeros: bool,
) -> torch.Tensor:
    """`attend(rows, keys, values, metadata)` on (B * L, H, D) and (media_total * R, Hkv, D).

    Arguments:
        writes_zeros: known of the library, where a sequence has no keys, of out and of dq.
    """
    metadata = varlen_metadata(layout, k.shape[1])
    attends = layout.attends()[..., None, None]
    rows = (q if writes_zeros else torch.where(attends, q, 0)).flatten(0, 1)
    if metadata.row_index is not None:
        rows = rows.index_select(0, metadata.row_index)
    out = attend(*(_aligned(x) for x in (rows, k.flatten(0, 1), v.flatten(0, 1))), metadata)
    if metadata.row_index is not None:
        out = out.index_select(0, metadata.row_index.argsort())
    out = out.unflatten(0, q.shape[:2])
    return out if writes_zeros else torch.where(attends, out, 0)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout, softmax_scale: float
) -> torch.Tensor:
    """torch.nn.attention.varlen: FlashAttention 2, or what the user has activated in PyTorch.

    Its backward is deterministic where R is at most one block of keys of the kernel (64 or 128), or
    under torch.use_deterministic_algorithms.

    Arguments:
        q: (B, L, H, D), B, L >= 1, of which `why_not` has nothing to say, as of the layout.
        k, v: (media_total, R, Hkv, D), media_total, R >= 1.

    Returns:
        (B, L, H, D); 0 where a token attends to nothing.
    """
    function = _function("varlen")
    options: dict[str, Any] = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    if torch.version.hip is None and _takes("varlen", "num_splits"):
        options["num_splits"] = 1  # Splits would depend on the rest of the batch.

    def attend(
        rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, metadata: VarlenMetadata
    ) -> torch.Tensor:
        return function(
            rows,
            keys,
            values,
            metadata.cu_seqlens_q,
            metadata.cu_seqlens_k,
            metadata.max_seqlen_q,
            metadata.max_seqlen_k,
            scale=softmax_scale,
            **options,
        )

    activated = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return _by_sequence(attend, q, k, v, layout, writes_zeros=activated in (None, "FA2", "FA3"))


def flash_attn_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout, softmax_scale: float
) -> torch.Tensor:
    """flash-attn: version 4 where it is installed and can run, otherwise version 2.

    Arguments and result: as of `varlen_attention`.
    """
    library = _flash_attn_library(q)
    function = _function(library)
    options: dict[str, Any] = {"num_splits": 1} if library == "flash_attn_4" else {}

    def attend(
        rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, metadata: VarlenMetadata
    ) -> torch.Tensor:
        out = function(
            rows,
            keys,
            values,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=metadata.max_seqlen_k,
            softmax_scale=softmax_scale,
            deterministic=True,
            **options,
        )
        return out[0] if isinstance(out, tuple) else out  # Version 4 returns the log-sums too.

    return _by_sequence(attend, q, k, v, layout, writes_zeros=library == "flash_attn")


def block_diagonal_mask(metadata: VarlenMetadata, num_rows: int, total_keys: int) -> Any:
    """xformers' BlockDiagonalMask, without waiting for a GPU.

    Its constructors want Python lists, which its forward and backward never look at but where they
    mask causally; only the ends of these are right here. Hence `split` and `materialize` of this
    one don't work.
    """
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask, _SeqLenInfo

    def part(seqstart: torch.Tensor, longest: int, total: int) -> Any:
        return _SeqLenInfo(
            seqstart=seqstart, max_seqlen=longest, min_seqlen=0, seqstart_py=[0, total]
        )

    return BlockDiagonalMask(
        q_seqinfo=part(metadata.cu_seqlens_q, metadata.max_seqlen_q, num_rows),
        k_seqinfo=part(metadata.cu_seqlens_k, metadata.max_seqlen_k, total_keys),
    )


def xformers_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: MediaLayout, softmax_scale: float
) -> torch.Tensor:
    """xformers' memory_efficient_attention, whichever kernel it chooses.

    Its backwards take as many heads in k and v as in q: where gradients are wanted and there are
    fewer, k and v are repeated in memory.

    Arguments and result: as of `varlen_attention`.
    """
    function = _function("xformers")
    heads, kv_heads = q.shape[2], k.shape[2]
    # It looks for a backward even under no_grad.
    needs_grad = any(tensor.requires_grad for tensor in (q, k, v))

    def attend(
        rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, metadata: VarlenMetadata
    ) -> torch.Tensor:
        bias = block_diagonal_mask(metadata, rows.shape[0], keys.shape[0])
        tensors = [rows, keys, values]
        if heads != kv_heads:
            group = heads // kv_heads
            tensors = [
                rows.unflatten(1, (kv_heads, group)),
                *(x.unsqueeze(2).expand(-1, -1, group, -1) for x in (keys, values)),
            ]
            if needs_grad:
                tensors = [tensor.flatten(1, 2) for tensor in tensors]
        out = function(*(x[None] for x in tensors), attn_bias=bias, scale=softmax_scale)
        return out.view(rows.shape)

    return _by_sequence(attend, q, k, v, layout, writes_zeros=False)


ADAPTERS = {
    "varlen": varlen_attention,
    "flash_attn": flash_attn_attention,
    "xformers": xformers_attention,
}
