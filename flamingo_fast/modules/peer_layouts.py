"""Where OpenFlamingo, flamingo-pytorch, flamingo-mini and Otter keep a resampler and its blocks.

Read from the peers' own code:

- open_flamingo 2.0.1: `src/helpers.py` (keys), `src/flamingo_lm.py` (prefixes and copies),
  `train/train_utils.py` (what its checkpoints leave out); the branch mllm, `src/vlm.py` and
  `src/cross_attn_lm.py`, calls `lang_encoder` lang_model and `perceiver` vision_tokenizer.
- flamingo-pytorch 0.1.2: `flamingo_pytorch.py`, `flamingo_palm.py`. `media_pos_emb` is added over
  the media, so it is `media_time_embs`. FlamingoPaLM's `video_frame_pos_emb` stays in `other`: it
  is not in the resampler, and images are not given it, as they are `frame_embs`.
- flamingo-mini (8a8feae): `perceiver_resampler.py`, `gated_cross_attention.py`. `time_pos_emb` is
  added over the frames, so it is `frame_embs`. Its resampler has to_k and to_v.
- Otter (1e7eb9a): `modeling_otter.py`, and `modeling_flamingo.py` with the same keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

PEERS = ("open_flamingo", "flamingo_pytorch", "flamingo_mini", "otter")

_FEED_FORWARD = ("0.weight", "0.bias", "1.weight", "3.weight")
RESAMPLER_KEYS = (
    *("latents", "frame_embs", "media_time_embs", "norm.weight", "norm.bias"),
    *(
        f"layers.{{i}}.0.{name}"
        for name in (
            *("norm_media.weight", "norm_media.bias", "norm_latents.weight", "norm_latents.bias"),
            *("to_q.weight", "to_kv.weight", "to_out.weight"),
        )
    ),
    *(f"layers.{{i}}.1.{name}" for name in _FEED_FORWARD),
)
BLOCK_KEYS = (
    *("attn_gate", "ff_gate", "attn.norm.weight", "attn.norm.bias"),
    *("attn.to_q.weight", "attn.to_kv.weight", "attn.to_out.weight"),
    *(f"ff.{name}" for name in _FEED_FORWARD),
)
# Of our modules' options: read from any peer's fork that has them, in no peer's own layout.
_OUR_RESAMPLER_KEYS = tuple(
    f"layers.{{i}}.{name}.bias" for name in ("0.to_q", "0.to_kv", "0.to_out", "1.1", "1.3")
)
_OUR_BLOCK_KEYS = (
    *("attn.norm_media.weight", "attn.norm_media.bias"),
    *(f"{name}.bias" for name in ("attn.to_q", "attn.to_kv", "attn.to_out", "ff.1", "ff.3")),
)

OPTIONAL_KEYS = ("frame_embs", "media_time_embs")


@dataclass(frozen=True)
class PeerLayout:
    """Where a peer keeps a resampler or its blocks, and what it calls their tensors.

    Arguments:
        prefix: before the keys in its own models.
        places: regular expressions of the modules that may hold it, anywhere in a model; of
            copies, the one in the first of them is kept.
        keys: canonical ones.
        our_keys: canonical ones of our modules' options.
        names: the start of our key to the start of theirs. Of several, the tensors concatenated
            in that order are ours. What is not listed has the same name.
        lacks: canonical keys it has no tensor for.
        requires: canonical keys, optional in OpenFlamingo, that it has always.
        one_width: media are as wide as the text.
    """

    prefix: str
    places: tuple[str, ...]
    keys: tuple[str, ...]
    our_keys: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    one_width: bool = False

    def theirs(self, key: str) -> tuple[str, ...]:
        """Their names of a canonical key, both with {i} for the layer of a resampler."""
        for ours, theirs in self.names.items():
            if key.startswith(ours):
                return tuple(start + key.removeprefix(ours) for start in theirs)
        return (key,)

    @cached_property
    def ours(self) -> dict[str, str]:
        """Canonical keys by their names, both with {i} for the layer of a resampler."""
        keys = (key for key in (*self.keys, *self.our_keys) if key not in self.lacks)
        return {theirs: key for key in keys for theirs in self.theirs(key)}

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(rf"(?:.*\.)?{place}\.(?P<key>.+)") for place in self.places)


_resampler = partial(PeerLayout, keys=RESAMPLER_KEYS, our_keys=_OUR_RESAMPLER_KEYS)
_block = partial(PeerLayout, keys=BLOCK_KEYS, our_keys=_OUR_BLOCK_KEYS)

_OF_PREFIX = "lang_encoder.{decoder_layers}.{i}.gated_cross_attn_layer."
_OF_PLACES = (r"(?P<i>\d+)\.gated_cross_attn_layer", r"gated_cross_attn_layers\.(?P<i>\d+)")

RESAMPLERS = {
    "open_flamingo": _resampler("perceiver.", ("perceiver", "vision_tokenizer")),
    "flamingo_pytorch": _resampler(
        "perceiver_resampler.",
        ("perceiver_resampler",),
        names={"media_time_embs": ("media_pos_emb",)},
        lacks=("frame_embs",),
        requires=("media_time_embs",),
    ),
    "flamingo_mini": _resampler(
        "flamingo.resampler.",
        ("resampler",),
        names={
            "frame_embs": ("time_pos_emb",),
            "layers.{i}.0.to_kv.": ("layers.{i}.0.to_k.", "layers.{i}.0.to_v."),
        },
        lacks=("media_time_embs",),
        requires=("frame_embs",),
    ),
    "otter": _resampler(
        "perceiver.",
        ("perceiver",),
        names={
            "layers.{i}.0.": ("layers.{i}.",),
            "layers.{i}.1.": ("layers.{i}.feed_forward.",),
        },
    ),
}
BLOCKS = {
    "open_flamingo": _block(_OF_PREFIX, _OF_PLACES),
    # A vision transformer too may have a layers.{i}.1, of other names.
    "flamingo_pytorch": _block(
        "layers.{i}.1.",
        (r"layers\.(?P<i>\d+)\.1(?=\.(?:attn|ff|attn_gate|ff_gate)(?:\.|$))",),
        one_width=True,
    ),
    "flamingo_mini": _block(
        "flamingo.lm.{decoder_layers}.{i}.xattn_block.",
        (r"(?P<i>\d+)\.xattn_block",),
        names={"attn_gate": ("alpha_attn",), "ff_gate": ("alpha_ffw",), "ff.": ("ffw.",)},
    ),
    "otter": _block(_OF_PREFIX, _OF_PLACES, names={"ff.": ("feed_forward.",)}),
}
