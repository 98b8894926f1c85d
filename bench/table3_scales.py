"""Sizes at which table 3 is measured: the paper's rows, or with everything smaller, in proportion.

They were chosen before anything was measured, by operations alone: no row's, over the baseline's,
are more than 0.05 from those at full size. Encoders have the paper's proportions as far as timm has
any of them, and with half of the language model's layers the resampler, whose depth some rows
change, is narrower than in proportion.
"""

import dataclasses
from typing import Any

from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.models.work import DATASETS, Batch, Flops, pass_flops

WEIGHTS = {"m3w": 1.0, "align": 0.2, "ltip": 0.2, "vtp": 0.03, "laion": 0.2}
"""Lambda (Flamingo, appendix B.1.2). LAION takes the places of ALIGN and LTIP."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a row's config and batches become.

    Attributes:
        encoders: in place of the paper's vision encoders, a name and an image size; none: those.
        resampler, lm: fields of those parts. The conditioning's heads are the language model's, and
            its media are as wide.
        num_layers: of grafting's stack.
        samples_divisor, tokens_divisor: of the paper's batch sizes, and of its texts' lengths.
        about: how long it takes, for people.
    """

    name: str
    encoders: dict[str, tuple[str, int]]
    resampler: dict[str, Any]
    lm: dict[str, Any]
    num_layers: int
    samples_divisor: int
    tokens_divisor: int
    about: str = ""

    def config(self, config: FlamingoConfig) -> FlamingoConfig:
        """Of one of `table3_configs`: what its row changes stays changed."""
        unchanged = config.vision.encoder, config.vision.image_size
        encoder, image_size = self.encoders.get(config.vision.encoder, unchanged)
        lm = dataclasses.replace(config.lm, **self.lm)
        return dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, encoder=encoder, image_size=image_size),
            resampler=dataclasses.replace(config.resampler, **self.resampler),
            conditioning=dataclasses.replace(
                config.conditioning,
                heads=lm.heads,
                dim_head=lm.dim_head,
                dim_media=lm.dim,
                num_layers=self.num_layers,
            ),
            lm=lm,
            eoc_token_id=lm.vocab_size,
            learnt_token_ids=(lm.vocab_size,),
        )

    def passes(self, config: FlamingoConfig) -> dict[str, Batch]:
        """A step's, by dataset; one with several passes has them as laion.0 and laion.1."""
        found = {}
        for dataset in config.datasets:
            batches = DATASETS[dataset]
            for index, batch in enumerate(batches):
                name = dataset if len(batches) == 1 else f"{dataset}.{index}"
                found[name] = Batch(
                    batch.samples // self.samples_divisor,
                    batch.tokens // self.tokens_divisor,
                    batch.media,
                    batch.frames,
                )
        return found

    def flops(self, config: FlamingoConfig) -> Flops:
        """Of a step of a config that `config` returned."""
        passes = self.passes(config).values()
        return sum((pass_flops(config, batch) for batch in passes), Flops())

    def changes(self) -> list[str]:
        """What is otherwise than in the paper's baseline, a line for each part."""
        full = table3_configs()["baseline"]
        ours = self.config(full)
        lines = []
        for part in ("resampler", "conditioning", "lm"):
            old, new = getattr(full, part), getattr(ours, part)
            fields = [
                f"{field.name} {getattr(old, field.name)} -> {getattr(new, field.name)}"
                for field in dataclasses.fields(old)
                if getattr(old, field.name) != getattr(new, field.name)
            ]
            lines += [f"{part}: {', '.join(fields)}"] if fields else []
        encoders = [f"{old} -> {name} at {size} px" for old, (name, size) in self.encoders.items()]
        batches = ", ".join(
            f"{name} {each.samples} x {each.tokens}" for name, each in self.passes(full).items()
        )
        return [
            *([f"vision: {', '.join(encoders)}"] if encoders else []),
            *(lines or ["models: as in the paper"]),
            f"batches: samples / {self.samples_divisor}, tokens / {self.tokens_divisor} "
            f"({batches}); 5 images or 1, 8 frames of a video, as in the paper",
        ]


_ALL = (
    Scale(
        name="full",
        encoders={},
        resampler={},
        lm={},
        num_layers=12,
        samples_divisor=64,
        tokens_divisor=1,
        about="the paper's models; a GPU, or minutes a step and 24 GB",
    ),
    Scale(
        name="half",
        encoders={
            "nfnet_f6": ("nfnet_f1", 208),
            "nfnet_f0": ("nfnet_l0", 160),
            "clip_vit_l14": ("vit_base_patch16_clip_224", 176),
        },
        resampler={"dim": 768, "heads": 8, "dim_head": 128, "num_latents": 32},
        lm={"vocab_size": 16000, "dim": 1024, "depth": 24, "heads": 8, "dim_head": 128},
        num_layers=12,
        samples_divisor=64,
        tokens_divisor=2,
        about="a GPU, or a minute a step",
    ),
    Scale(
        name="mini",
        encoders={
            "nfnet_f6": ("test_nfnet", 160),
            "nfnet_f0": ("nfnet_mini", 160),
            "clip_vit_l14": ("vit_tiny_patch16_224", 96),
        },
        resampler={"dim": 128, "heads": 5, "dim_head": 32, "num_latents": 12},
        lm={"vocab_size": 2560, "dim": 320, "depth": 12, "heads": 5, "dim_head": 64},
        num_layers=6,
        samples_divisor=64,
        tokens_divisor=4,
        about="10 minutes on 2 cores",
    ),
    Scale(
        name="micro",
        encoders={
            "nfnet_f6": ("test_nfnet", 96),
            "nfnet_f0": ("nfnet_mini", 96),
            "clip_vit_l14": ("vit_tiny_patch16_224", 64),
        },
        resampler={"dim": 144, "heads": 6, "dim_head": 32, "num_latents": 5},
        lm={"vocab_size": 1500, "dim": 192, "depth": 12, "heads": 6, "dim_head": 32},
        num_layers=6,
        samples_divisor=64,
        tokens_divisor=4,
        about="5 minutes on 2 cores",
    ),
)
SCALES = {scale.name: scale for scale in _ALL}
