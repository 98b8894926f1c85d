"""What constructors of modules check and make of their arguments."""

from flamingo_fast.modules.norm import LayerNorm, RMSNorm
from flamingo_fast.ops.checks import one_of
from flamingo_fast.ops.dispatch import ATTENTION_IMPLS, IMPLS, check_impl
from flamingo_fast.ops.norm import NORMS


def check_dims(least: int = 1, /, **dims: int) -> None:
    """All are integers, and not below `least`."""
    for name, value in dims.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")


def check_heads(heads: int, kv_heads: int | None) -> int:
    """kv_heads, by default heads."""
    kv_heads = heads if kv_heads is None else kv_heads
    check_dims(heads=heads, kv_heads=kv_heads)
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of {heads} heads, got {kv_heads}")
    return kv_heads


def op_impl(impl: str) -> str:
    """Of the ops beside attention in a module of this impl."""
    return "auto" if check_impl(impl, ATTENTION_IMPLS) not in IMPLS else impl


def make_norm(norm: str, dim: int, impl: str) -> LayerNorm | RMSNorm:
    """Of eps 1e-5, which is torch.nn.LayerNorm's and the peers'."""
    if one_of("norm", norm, NORMS) == "rms":
        return RMSNorm(dim, 1e-5, impl=impl)
    return LayerNorm(dim, impl=impl)
