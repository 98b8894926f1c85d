"""Random inputs in the memory layouts that models hand to ops, and ones without values."""

import torch

LAYOUTS = ("contiguous", "sliced", "padded", "transposed", "stepped", "expanded")


def meta_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """For launches that are compiled and not run."""
    return torch.empty(shape, dtype=dtype, device="meta")


def random_tensor(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int,
    layout: str = "contiguous",
    requires_grad: bool = False,
) -> torch.Tensor:
    """Standard normal values on the default device; the same seed and shape give the same values
    in every layout but "expanded".

    Arguments:
        layout: "contiguous"; "sliced" out of a fused projection (one more dimension before the
            last two, as q of a (..., 3, heads, head_dim) tensor); "padded" rows; "transposed", last
            dimension not contiguous; "stepped", every other element of the last dimension; or
            "expanded", one value (per row) all along it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}; got {layout!r}")
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    values = values.to(torch.get_default_device(), dtype)
    if layout == "sliced" and len(shape) > 1:
        fused = torch.stack([values] * 3, dim=-3 if len(shape) > 2 else 0)
        values = fused.select(-3 if len(shape) > 2 else 0, 1)
    elif layout == "padded":
        wide = torch.nn.functional.pad(values, (3, 5))
        values = wide[..., 3 : 3 + shape[-1]]
    elif layout == "transposed" and len(shape) > 1:
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "stepped":
        values = torch.stack([values, torch.full_like(values, 1e4)], dim=-1)[..., 0]
    elif layout == "expanded":
        values = values[..., :1].expand(shape)
    return values.requires_grad_(requires_grad)
