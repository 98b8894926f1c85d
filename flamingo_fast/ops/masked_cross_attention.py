"""masked_cross_attention: text attends to the tokens of the media that a MediaLayout gives it."""

import torch

from flamingo_fast import reference
from flamingo_fast.layout import MediaLayout
from flamingo_fast.ops.checks import check_attention_inputs, one_of
from flamingo_fast.ops.dispatch import VARLEN_IMPLS
from flamingo_fast.ops.one_medium_attention import one_medium_attention
from flamingo_fast.ops.other_attention import choose_attention, library_attention
from flamingo_fast.ops.sdpa_attention import sdpa_attention
from flamingo_fast.ops.several_media_attention import several_media_attention

UNATTENDED = ("zero", "dense", "uniform")
PAST_LAST = ("zero", "uniform")


def _mean_of_values(v: torch.Tensor, layout: MediaLayout, num_heads: int) -> torch.Tensor:
    """(B, H, D): of all valid tokens of the sample's media; 0 where there are none."""
    num_keys = v.shape[1]
    if layout.media_seqlens is not None:
        lengths = layout.media_seqlens.clamp(0, num_keys)
        tokens = torch.arange(num_keys, device=v.device) < lengths[:, None]
        v = torch.where(tokens[..., None, None], v, 0)
    else:
        lengths = torch.full_like(v[:, 0, 0, 0], num_keys, dtype=torch.int32)
    sums = v.sum(1, dtype=torch.promote_types(v.dtype, torch.float32))
    media = layout.cu_media[:-1, None] + torch.arange(layout.max_media, device=v.device)
    of_sample = media < layout.cu_media[1:, None]
    # Gathered, not multiplied with zeros and ones: what is not finite stays in its sample.
    media = media.clamp(0, layout.media_total - 1)
    total = torch.where(of_sample[..., None, None], sums[media], 0).sum(1)
    count = torch.where(of_sample, lengths[media], 0).sum(1).clamp(min=1)
    mean = (total / count[:, None, None]).to(v.dtype)
    return mean.repeat_interleave(num_heads // v.shape[2], 1)


def _one_medium_kernels_fit(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the shared memory of every architecture holds a medium's keys and values."""
    num_keys, head_dim = k.shape[1], q.shape[3]
    most = (128, 64 * 128) if q.dtype == torch.float32 else (256, 64 * 256)
    fits = head_dim <= most[0] and _padded(num_keys) * _padded(head_dim) <= most[1]
    return fits and num_keys <= 128


def _padded(size: int) -> int:
    return max(1 << (size - 1).bit_length(), 16)


def masked_cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MediaLayout,
    *,
    unattended: str = "zero",
    past_last: str = "zero",
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Each text token attends to all tokens of its media (Flamingo, section 2.3 and figure 4).

    B batch, L text tokens, N media of a sample, R tokens of a medium, H query heads, Hkv key/value
    heads, D head dim.

    Arguments:
        q: (B, L, H, D), fp32, fp16 or bf16 (fp64 outside Triton), any strides.
        k, v: (media_total, R, Hkv, D), or (B, N, R, Hkv, D) where every sample has N media; q's
            dtype, any strides; H is a multiple of Hkv.
        layout: which media each token attends to; see `MediaLayout`.
        unattended: what a token gets that attends to nothing: "zero" (OpenFlamingo, IDEFICS);
            "dense", attention to all tokens of the sample's media, valid or not (transformers'
            Mllama); "uniform", the mean of the sample's valid values (OpenFlamingo with all
            previous media).
        past_last: the same for tokens after more image tokens than there are media: "zero" or
            "uniform" (OpenFlamingo).
        softmax_scale: D ** -0.5 by default.
        impl: "auto", "triton", "torch" or "reference"; "sdpa", PyTorch's attention under a dense
            mask, a baseline; "varlen" (torch.nn.attention.varlen), "flash_attn" (version 4 where it
            can run, otherwise 2) or "xformers", which take one medium a token and a GPU. "torch" is
            for CPUs, and "sdpa" elsewhere.

    Returns:
        q's shape and dtype. A sample's result is the same, bit for bit, in any batch whose layout
        is of one medium a token, or of several, as its own is.

    Raises:
        TypeError, ValueError: a wrong argument, by name.
        BackendUnavailableError: `impl` can't run here.
    """
    softmax_scale = check_attention_inputs(q, k, v, layout, softmax_scale)
    one_of("unattended", unattended, UNATTENDED)
    one_of("past_last", past_last, PAST_LAST)
    if layout.is_packed and (unattended, past_last) != ("zero", "zero"):
        raise ValueError(
            'layout: of packed documents, expected unattended and past_last "zero", got '
            f"{unattended!r} and {past_last!r}: one document would attend to another's media"
        )
    if k.dim() == 5:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    dense = unattended == "dense"
    impl = choose_attention(impl, q)
    attend_by_library = None
    if impl in VARLEN_IMPLS:
        attend_by_library = library_attention(impl, q, k, layout, dense)
    if impl == "reference" or q.numel() == 0 or k.numel() == 0:
        return reference.masked_cross_attention(
            q, k, v, layout, unattended, past_last, softmax_scale
        )
    # Inside the Functions gradients are off, and inputs want them even under no_grad.
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    one_medium = layout.max_media_per_token <= 1 and not dense
    if impl == "sdpa":
        out = sdpa_attention(q, k, v, layout, dense, softmax_scale)
    elif attend_by_library is not None:
        out = attend_by_library(q, k, v, layout, softmax_scale)
    elif one_medium and (impl == "torch" or _one_medium_kernels_fit(q, k)):
        out = one_medium_attention(q, k, v, layout, softmax_scale, needs_grad, impl)
    else:
        out = several_media_attention(q, k, v, layout, dense, softmax_scale, needs_grad, impl)
    if "uniform" in (unattended, past_last):
        rows = layout.uniform_rows(unattended == "uniform", past_last == "uniform")
        if rows is None:
            return out
        mean = _mean_of_values(v, layout, q.shape[2])
        out = torch.where(rows[..., None, None], mean[:, None], out)
    return out
