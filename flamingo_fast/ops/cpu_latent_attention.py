"""The `torch` implementation of latent_attention: a flash kernel for each source of keys."""

import torch

_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def latent_forward(
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    need_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out`, contiguous, and the log-sum-exp of the scaled scores.

    Arguments:
        q: (B, R, H, D). k_media, v_media: (B, S, Hkv, D). k_latents, v_latents: (B, R, Hkv, D). Any
            strides.
        media_seqlens: (B,) int32 or None.

    Returns:
        lse: (B, H, R), contiguous, fp32 (fp64 of fp64); (0,) if it is not needed.
    """
    raise NotImplementedError


def latent_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k_media: torch.Tensor,
    v_media: torch.Tensor,
    k_latents: torch.Tensor,
    v_latents: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    media_seqlens: torch.Tensor | None,
    softmax_scale: float,
    dq: torch.Tensor,
    dmedia: torch.Tensor,
    dlatents: torch.Tensor,
) -> None:
    """Fills dq, contiguous, and dk and dv of media and latents, (2, B, S or R, Hkv, D).

    Any of the three may have no elements: what is not needed is not computed. `out` and `lse` are
    what the forward returned; the other arguments are its own.
    """
    raise NotImplementedError
