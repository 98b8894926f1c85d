"""Models of the paper (arXiv 2204.14198) as configs: their sizes, and the rows of table 3.

"Table" and "appendix" are that paper's. Where its printed sizes and its parameter counts disagree,
these follow the counts: `flamingo-fast params` shows all of them.
"""

import dataclasses
from typing import Any

from flamingo_fast.models.config import (
    SINGLE_IN_MIDDLE,
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)


def _of_the_paper(*, dim: int, depth: int, heads: int, every: int) -> FlamingoConfig:
    """One of the three sizes: they share vision encoder and resampler, and key size 128.

    `<EOC>` is "added to the vocabulary and learnt" (section 2.4): the id after the last.
    """
    lm = LanguageModelConfig(dim=dim, depth=depth, heads=heads)
    return FlamingoConfig(
        conditioning=ConditioningConfig(every=every, heads=heads, dim_media=dim),
        lm=lm,
        eoc_token_id=lm.vocab_size,
        learnt_token_ids=(lm.vocab_size,),
    )


FLAMINGO_3B = _of_the_paper(dim=2048, depth=24, heads=16, every=1)
"""Flamingo-3B: a block at each of the 24 layers of a language model of 1.4B."""

FLAMINGO_9B = _of_the_paper(dim=4096, depth=32, heads=32, every=4)
"""Flamingo-9B: 32 layers with 8 blocks, where table 4 prints 40 and 10.

Only so does the language model have table 5's 7.1B parameters (of 40 layers: 8.9B), and do the
blocks have its 1.6B (10 blocks: 2.0B); Gopher's model of 7.1B has 32 layers too.
"""

FLAMINGO_80B = _of_the_paper(dim=8192, depth=80, heads=64, every=7)
"""Flamingo (80B): a block at every 7th of Chinchilla's 80 layers: 12."""

FLAMINGO_MINI = FlamingoConfig(
    vision=VisionConfig(encoder="nfnet_mini", image_size=64, is_frozen=False),
    resampler=ResamplerConfig(dim=64, depth=2, heads=4, dim_head=16, num_latents=8),
    conditioning=ConditioningConfig(heads=4, dim_head=32, dim_media=128),
    lm=LanguageModelConfig(
        vocab_size=1000,
        dim=128,
        depth=4,
        heads=4,
        dim_head=32,
        is_frozen=False,
        is_pretrained=False,
    ),
)
"""Trains on a CPU in minutes. Nothing of it is frozen, as none of its weights exist yet."""

PRESETS: dict[str, FlamingoConfig] = {
    "flamingo-3b": FLAMINGO_3B,
    "flamingo-9b": FLAMINGO_9B,
    "flamingo-80b": FLAMINGO_80B,
    "flamingo-mini": FLAMINGO_MINI,
}


def table3_configs() -> dict[str, FlamingoConfig]:
    """The rows of table 3, and the models and datasets of table 10 and of v1's table 7.

    The keys are the column `row` of bench/data/table3.csv, in its order. Each is flamingo-3b but
    for what its row changes. Not in the paper are:

    - sizes of the MLP and Transformer resamplers: depth and hidden width keep the Perceiver's
      number of parameters, a "parameter budget" (section 4.4.2 of v1), to 0.1 M;
    - sizes of the small and large resamplers: half and twice the depth. They print as table 10's
      3.1B and 3.4B;
    - the resolution of CLIP ViT-L/14: 224, its own.
    """
    base = FlamingoConfig.preset("flamingo-3b")
    return {
        "baseline": base,
        "wo_video_text": _change(base, datasets=("m3w", "align", "ltip")),
        "wo_image_text": _change(base, datasets=("m3w", "vtp")),
        "laion": _change(base, datasets=("m3w", "laion", "vtp")),
        "wo_m3w": _change(base, datasets=("align", "ltip", "vtp")),
        "round_robin": _change(base, optimisation="round_robin"),
        "no_tanh_gating": _change(base, conditioning={"tanh_gating": False}),
        "vanilla_xattn": _change(base, conditioning={"kind": "vanilla_xattn"}),
        "grafting": _change(base, conditioning={"kind": "grafting"}),
        "single_in_middle": _change(base, conditioning={"every": SINGLE_IN_MIDDLE}),
        "every_4th": _change(base, conditioning={"every": 4}),
        "every_2nd": _change(base, conditioning={"every": 2}),
        "mlp": _change(base, resampler={"kind": "mlp", "depth": 8, "ff_mult": 5 + 1 / 256}),
        "transformer": _change(base, resampler={"kind": "transformer", "ff_mult": 4 + 1 / 256}),
        "clip_vit_l14": _change(base, vision={"encoder": "clip_vit_l14", "image_size": 224}),
        "nfnet_f0": _change(base, vision={"encoder": "nfnet_f0"}),
        "lm_random_init": _change(base, lm={"is_frozen": False, "is_pretrained": False}),
        "lm_pretrained": _change(base, lm={"is_frozen": False}),
        "resampler_small": _change(base, resampler={"depth": 3}),
        "resampler_large": _change(base, resampler={"depth": 12}),
        "all_previous_images": _change(base, conditioning={"attend": "all_previous"}),
        "m3w_only": _change(base, datasets=("m3w",)),
        "vision_unfrozen": _change(base, vision={"is_frozen": False}),
    }


def _change(config: FlamingoConfig, **changes: Any) -> FlamingoConfig:
    """`config` with other fields; those of a part are given as a dict."""
    for name, value in changes.items():
        if isinstance(value, dict):
            changes[name] = dataclasses.replace(getattr(config, name), **value)
    return dataclasses.replace(config, **changes)
