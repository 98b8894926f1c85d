"""What transformers' own hooks are used for: models that load patched, and an attention function.

`patch` needs neither. transformers is imported when one of them is called.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from flamingo_fast.patching.engine import patch
from flamingo_fast.patching.report import PatchReport
from flamingo_fast.patching.rules import is_a

# The name of our attention function.
ATTENTION = "flamingo_fast"
# What a whole model makes of its parts by name, so that transformers can put another class there;
# all that rules match is in them. An outer one comes before those in it.
_PARTS = {
    "idefics": ("IdeficsModel",),
    "idefics2": ("Idefics2PerceiverResampler",),
    "mllama": ("MllamaModel", "MllamaTextModel"),
}


@contextlib.contextmanager
def patch_on_load(**options: Any) -> Iterator[list[PatchReport]]:
    """Inside, Idefics, Idefics2 and Mllama models of transformers come patched from loading.

    From `from_pretrained` and `from_config` of a whole model, such as
    IdeficsForVisionText2Text or an Auto class: it is patched while it is made, before quantisation
    and device maps. The model's class, state-dict keys and pickle are those of one that is patched
    after loading; `unpatch` undoes it. Models that are a part by themselves
    (IdeficsModel.from_pretrained) are not reached; `patch` is for those.

    Arguments:
        options: those of `patch`.

    Returns:
        A list, to which the report of each model is added.

    Raises:
        ImportError: no transformers, or version 4, which has no hook for it; `patch` the model
            after loading.
        TypeError, ValueError: a wrong argument, by name; a `patch_on_load` inside another.
    """
    transformers = _transformers()
    try:
        hooks = importlib.import_module("transformers.monkey_patching")
    except ImportError as error:
        raise ImportError(
            f"transformers {transformers.__version__} can't put other classes into models that it "
            "loads (transformers.monkey_patching, of version 5); load the model, and then call "
            "flamingo_fast.patch(model)"
        ) from error
    # Arguments are wrong now, not in the midst of loading.
    patch(nn.Identity(), **options)
    reports: list[PatchReport] = []
    depth = 0

    def make(original: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        nonlocal depth
        depth += 1
        try:
            made = original(*args, **kwargs)
        finally:
            depth -= 1
        # The outermost one patches what is in it.
        if depth == 0:
            reports.append(patch(made, **options))
        return made

    # As patterns of the whole name: transformers searches for names inside others.
    mapping = {f"^{each.__name__}$": _stand_in(each, make) for each in _parts()}
    hooks.register_patch_mapping(mapping)
    try:
        yield reports
    finally:
        hooks.unregister_patch_mapping(list(mapping))
        _put_back(mapping.values())


def _transformers() -> Any:
    # Here: it imports all of `models`.
    from flamingo_fast.models.extras import require

    return require("transformers")


class _StandIn(type):
    """Of a model's class: what it makes are instances of that class itself, and so of this one.

    Instances of a subclass could not be pickled. While transformers has this in the class's place,
    its `_init_weights` and the like ask for instances of this.
    """

    _make: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._make(cls.__base__, *args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__base__)  # type: ignore[arg-type]


def _stand_in(original: type[nn.Module], make: Any) -> type:
    place = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return _StandIn(original.__name__, (original,), {**place, "_make": staticmethod(make)})


def _parts() -> Iterator[type[nn.Module]]:
    for family, names in _PARTS.items():
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        yield from (getattr(module, name) for name in names)


def _put_back(stand_ins: Iterable[type]) -> None:
    """transformers does not, where making a model fails."""
    for name, module in list(sys.modules.items()):
        if not name.startswith("transformers"):
            continue
        for stand_in in stand_ins:
            if vars(module).get(stand_in.__name__) is stand_in:
                setattr(module, stand_in.__name__, stand_in.__base__)


def register_attention() -> None:
    """For `model.set_attn_implementation("flamingo_fast")`, beside "eager" and "sdpa".

    It is "sdpa", but cross-attention to images without a mask is to all of them, as in "eager":
    "sdpa" takes it for causal (transformers #48172). Layouts in place of masks are what `patch` is
    for: an attention function gets the dense mask, which has cost its time by then.

    Raises:
        ImportError: transformers is not installed; says how to install it.
    """
    _transformers()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    # Without a function for its masks transformers would make none.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: (B, H, T, D) to (B, T, H, D), and no weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if is_causal is None and _attends_to_media(module):
        is_causal = False
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
    )


def _attends_to_media(module: nn.Module) -> bool:
    is_idefics = getattr(module, "is_cross_attention", False) is True
    return is_idefics or is_a(module, "MllamaTextCrossAttention")
