"""The peers' own code, as they published it: a second oracle, and a baseline of the benchmarks.

Of OpenFlamingo and flamingo-pytorch only the files with the attention and model classes are loaded,
under their own module names: the package of open_flamingo imports a library of vision models and
one of tokenizers. Of transformers, single modules with random weights, and the masks of its
processors.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from flamingo_fast.models.extras import require

OPEN_FLAMINGO = "open-flamingo==2.0.1"
FLAMINGO_PYTORCH = "flamingo-pytorch==0.1.2"


def open_flamingo() -> ModuleType:
    """OpenFlamingo's `src/helpers.py`: MaskedCrossAttention, GatedCrossAttentionBlock,
    PerceiverAttention, PerceiverResampler.

    Raises:
        ImportError: it, or what it imports, is not installed; says how to install it.
    """
    return _load("open_flamingo.src.helpers", OPEN_FLAMINGO)


def open_flamingo_model(
    visual: torch.nn.Module,
    lang_model: torch.nn.Module,
    decoder_layers: str,
    *,
    vis_dim: int,
    eoc_token_id: int,
    media_token_id: int,
    cross_attn_every_n_layers: int = 1,
) -> torch.nn.Module:
    """OpenFlamingo's whole model, by the code of its `src`, and what its factory trains.

    Newer versions of transformers give some layers their arguments by position, which
    OpenFlamingo's wrapper of them doesn't take: they get them by name.

    Arguments:
        visual: maps images (n, 3, H, W) to (pooled, tokens (n, S, vis_dim)).
        lang_model: a causal language model of transformers, of the size that all token ids need.
            It becomes the model's, and can't be used without it any more.
        decoder_layers: where it has its layers, "model.layers" of Llama.

    Raises:
        ImportError: OpenFlamingo, or what it imports, is not installed; says how to install it.
    """
    # In the order of their imports of each other.
    files = ("helpers", "utils", "flamingo_lm", "flamingo")
    code = {name: _load(f"open_flamingo.src.{name}", OPEN_FLAMINGO) for name in files}
    code["utils"].extend_instance(lang_model, code["flamingo_lm"].FlamingoLMMixin)
    lang_encoder: Any = lang_model
    lang_encoder.set_decoder_layers_attr_name(decoder_layers)
    model = code["flamingo"].Flamingo(
        SimpleNamespace(visual=visual),
        lang_model,
        eoc_token_id,
        media_token_id,
        vis_dim=vis_dim,
        cross_attn_every_n_layers=cross_attn_every_n_layers,
    )
    by_name = _by_name(code["flamingo_lm"].FlamingoLayer)
    for layer in lang_encoder._get_decoder_layers():
        layer.__class__ = by_name
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    lang_encoder.get_input_embeddings().requires_grad_(True)
    return model


def _by_name(flamingo_layer: Any) -> type:
    class ByName(flamingo_layer):
        """Its own forward, with the arguments of the layer inside it by name."""

        def forward(self, lang_x: torch.Tensor, *args: Any, **named: Any) -> Any:
            parameters = list(inspect.signature(self.decoder_layer.forward).parameters)[1:]
            return super().forward(lang_x, **dict(zip(parameters, args, strict=False)), **named)

    return ByName


def flamingo_pytorch() -> ModuleType:
    """flamingo-pytorch's `flamingo_pytorch.py`, with the classes that `open_flamingo` has.

    Raises:
        ImportError: it, or what it imports, is not installed; says how to install it.
    """
    return _load("flamingo_pytorch.flamingo_pytorch", FLAMINGO_PYTORCH)


def flamingo_pytorch_palm() -> ModuleType:
    """flamingo-pytorch's `flamingo_palm.py`, with FlamingoPaLM: a whole model.

    Raises:
        ImportError: it, or what it imports, is not installed; says how to install it.
    """
    flamingo_pytorch()
    return importlib.import_module("flamingo_pytorch.flamingo_palm")


def idefics_layer(
    hidden_size: int, num_heads: int, image_size: int, qk_layer_norms: bool = False
) -> torch.nn.Module:
    """transformers' IdeficsGatedCrossAttentionLayer, eager, with its gates open.

    Arguments:
        image_size: of the last dimension of the image states.

    Raises:
        ImportError: transformers is not installed; says how to install it.
    """
    module = _of_transformers("idefics.modeling_idefics")
    config = _of_transformers("idefics.configuration_idefics").IdeficsConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size,
        num_attention_heads=num_heads,
        vision_config={"embed_dim": image_size},
        qk_layer_norms=qk_layer_norms,
        alpha_initializer="ones",
        attn_implementation="eager",
    )
    return module.IdeficsGatedCrossAttentionLayer(config, layer_idx=0)


def idefics_image_attention_mask(
    input_ids: torch.Tensor, image_token: int, eos_token: int, num_images: int
) -> torch.Tensor:
    """What transformers' processor for IDEFICS makes: (B, L, num_images) int64.

    Arguments:
        input_ids: (B, L) int64.

    Raises:
        ImportError: transformers is not installed; says how to install it.
    """
    processing = _of_transformers("idefics.processing_idefics")
    tokenizer = SimpleNamespace(
        convert_tokens_to_ids=lambda token: image_token, eos_token_id=eos_token
    )
    last_image, _ = processing.image_attention_mask_for_packed_input_ids(
        input_ids, tokenizer, return_tensors="pt"
    )
    return processing.incremental_to_binary_attention_mask(
        last_image, return_tensors="pt", num_classes=num_images
    )


def mllama_cross_attention(
    hidden_size: int, num_heads: int, num_key_value_heads: int
) -> torch.nn.Module:
    """transformers' MllamaTextCrossAttention, eager.

    Raises:
        ImportError: transformers is not installed; says how to install it.
    """
    module = _of_transformers("mllama.modeling_mllama")
    config = _of_transformers("mllama.configuration_mllama").MllamaTextConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        attn_implementation="eager",
    )
    return module.MllamaTextCrossAttention(config, layer_idx=0)


def mllama_cross_attention_mask(
    input_ids: Sequence[Sequence[int]],
    image_token: int,
    num_tiles: Sequence[Sequence[int]],
    max_num_tiles: int = 4,
) -> torch.Tensor:
    """What transformers' processor for Mllama makes: (B, L, N, max_num_tiles) int64.

    Arguments:
        input_ids: of each sample, not padded; the mask is as long as the longest.
        num_tiles: of each image of each sample.

    Raises:
        ImportError: transformers is not installed; says how to install it.
    """
    processing = _of_transformers("mllama.processing_mllama")
    mask = processing.convert_sparse_cross_attention_mask_to_dense(
        [processing.get_cross_attention_token_mask(ids, image_token) for ids in input_ids],
        num_tiles=num_tiles,
        max_num_tiles=max_num_tiles,
        length=max(map(len, input_ids)),
    )
    return torch.from_numpy(mask)


def mllama_attention_bias(mask: torch.Tensor, tokens_per_tile: int) -> torch.Tensor:
    """What transformers' Mllama adds to the scores: (B, 1, L, N * tiles * tokens_per_tile) fp32.

    Arguments:
        mask: (B, L, N, tiles) integers.

    Raises:
        ImportError: transformers is not installed; says how to install it.
    """
    module = _of_transformers("mllama.modeling_mllama")
    bias, _ = module._prepare_cross_attention_mask(mask, tokens_per_tile, torch.float32)
    return bias


@contextmanager
def attention_in_place(
    module: torch.nn.Module, attention: Callable[..., torch.Tensor]
) -> Iterator[None]:
    """Inside, modules of `module`'s file that are eager attend by `attention`.

    Arguments:
        module: of `idefics_layer` or `mllama_cross_attention`.
        attention: a function of q (B, L, H, D), k and v (B, keys, Hkv, D) and the scale of the
            scores; returns (B, L, H, D).
    """

    def in_their_form(
        _: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **unused: object,
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attention(q, k, v, scaling), None

    file = sys.modules[type(module).__module__]
    with mock.patch.object(file, "eager_attention_forward", in_their_form):
        yield


def _of_transformers(name: str) -> ModuleType:
    return require(f"transformers.models.{name}")


def _load(name: str, requirement: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    package, *path = name.split(".")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(_how_to_install(package, requirement))
    (folder, *_) = found.submodule_search_locations
    spec = importlib.util.spec_from_file_location(name, Path(folder, *path[:-1], f"{path[-1]}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(_how_to_install(str(error.name), requirement)) from error
    # torch.compile looks classes up by their module's name.
    sys.modules[name] = module
    return module


def _how_to_install(missing: str, requirement: str) -> str:
    return (
        f"{missing} is not installed: pip install --no-deps {requirement} && "
        "pip install einops einops-exts"
    )
