"""A Flamingo-style model's parts that a profile names, whoever wrote it.

They are found by structure, as what `patch` replaces is: ours, OpenFlamingo and those after it,
flamingo-pytorch, flamingo-mini, and transformers' Idefics, Idefics2 and Mllama.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.modules.blocks import _GatedLayer
from flamingo_fast.modules.resampler import _Resampler
from flamingo_fast.patching.state import state_of

_VISION = ("vision_encoder", "vision_model", "vision_tower", "vision", "visual")
_LANGUAGE = ("lang_encoder", "language_model", "text_model")
_LAYERS = ("layers", "blocks", "h")
# Of a gated block, by whoever wrote it, as are its children's.
_GATES = ("attn_gate", "alpha_attn", "alpha_cross_attn", "cross_attn_attn_gate")
_ATTENTION = ("attn", "cross_attn")
_FEED_FORWARD = ("ff", "feed_forward", "ffw", "mlp")

Part = tuple[str, nn.Module]


def find_parts(model: nn.Module) -> list[Part]:
    """Names and modules: "model" itself, and in it "vision", "resampler", "lm", "lm layer 0",
    "gated block 0" and so on; within a gated block "attention" and "feed-forward".

    Those of `flamingo_fast` and patched ones name what is within them by themselves
    (`flamingo_fast.ranges.within`): hooks there would be in the way of shortcuts. A compiled module
    is one part, as what is in it is called no more.
    """
    return [("model", model), *_Search(model).parts()]


class _Search:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: set[nn.Module] = set()
        self._blocks = 0

    def parts(self) -> Iterator[Part]:
        model = self._model
        if isinstance(model, Flamingo):
            # The rest of the language model is its head, which the loss calls.
            yield "lm", model.lang_model.base_model
        if not _is_compiled(model):
            yield from self._children(model)

    def _children(self, module: nn.Module) -> Iterator[Part]:
        for name, child in module.named_children():
            if child not in self._seen:
                self._seen.add(child)
                yield from self._of(name, child)

    def _of(self, name: str, module: nn.Module) -> Iterator[Part]:
        if name in _VISION:
            yield "vision", module
        elif _is_gated(module):
            yield f"gated block {self._blocks}", module
            self._blocks += 1
            yield from _within_gated(module)
        elif _is_resampler(module):
            yield "resampler", module
            yield from _within_resampler(module)
        elif _is_compiled(module):
            yield name, module
        elif isinstance(module, nn.ModuleList) and name in _LAYERS:
            yield from self._layers(module)
        else:
            if name in _LANGUAGE:
                yield "lm", module
            yield from self._children(module)

    def _layers(self, layers: nn.ModuleList) -> Iterator[Part]:
        # The grafted ones of table 3 are no layers of the language model's.
        conditioning = getattr(self._model, "conditioning", None)
        what = "new layer" if layers is getattr(conditioning, "layers", layers) else "lm layer"
        what = "lm layer" if conditioning is None else what
        for index, layer in enumerate(layers):
            if layer in self._seen:
                continue
            if not _is_gated(layer):
                self._seen.add(layer)
                yield f"{what} {index}", layer
                if not _is_compiled(layer):
                    yield from self._children(layer)
        yield from self._children(layers)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _is_gated(module: nn.Module) -> bool:
    return isinstance(module, _GatedLayer) or any(name in module._parameters for name in _GATES)


def _is_resampler(module: nn.Module) -> bool:
    if isinstance(module, _Resampler):
        return True
    names = [cls.__name__ for cls in type(module).__mro__]
    return "latents" in module._parameters or any("Resampler" in name for name in names)


def _within_gated(block: nn.Module) -> Iterator[Part]:
    if isinstance(block, _GatedLayer) or state_of(block) is not None or _is_compiled(block):
        return
    for part, names in (("attention", _ATTENTION), ("feed-forward", _FEED_FORWARD)):
        child = next((getattr(block, name) for name in names if hasattr(block, name)), None)
        # Otter's are lists, whose modules are called.
        if isinstance(child, nn.Module) and not isinstance(child, nn.ModuleList):
            yield part, child


def _within_resampler(resampler: Any) -> Iterator[Part]:
    if isinstance(resampler, _Resampler) or _is_compiled(resampler):
        return
    layers = next(
        (child for name, child in resampler.named_children() if name in _LAYERS), nn.ModuleList()
    )
    for index, layer in enumerate(layers):
        if not isinstance(layer, nn.ModuleList):
            yield f"layer {index}", layer
        elif state_of(resampler) is None:
            for part, module in zip(("attention", "feed-forward"), layer, strict=False):
                yield f"layer {index} {part}", module
