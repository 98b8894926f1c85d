"""Real samples for table 3's steps: a batch of each dataset, read before the clock starts."""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from flamingo_fast.bench.table3_scales import Scale
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import DatasetConfig, TrainConfig
from flamingo_fast.training.model_source import load_tokenizer
from flamingo_fast.training.stream import make_stream

_KINDS = {"m3w": "interleaved", "vtp": "video_text"}
# The paper's, which the vocabulary lacks.
_IMAGE, _EOC = "<image>", "<EOC>"


class RealData:
    """A folder with shards of each dataset, m3w-*.tar and so on, and a tokenizer.json.

    Rows are padded to the length of the paper, at the scale: longer texts are cut, and of pages the
    first images are taken, as in training. A model's vocabulary becomes the tokenizer's.

    Raises:
        ConfigError: a tokenizer that there is not.
    """

    def __init__(self, folder: Path, scale: Scale, device: torch.device) -> None:
        self.folder, self._scale, self._device = folder, scale, device
        self._tokenizer = load_tokenizer(str(folder / "tokenizer.json"))

    def __str__(self) -> str:
        return f"{self.folder.name}, {len(self._tokenizer)} tokens"

    def config(self, config: FlamingoConfig) -> FlamingoConfig:
        """A row's at the scale, for the tokenizer's ids: what it doesn't have yet is learnt."""
        tokenizer = load_tokenizer(str(self.folder / "tokenizer.json"))
        known = len(tokenizer)
        tokenizer.add_tokens([_EOC, _IMAGE], special_tokens=True)
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (_EOC, _IMAGE)}
        return dataclasses.replace(
            config,
            lm=dataclasses.replace(config.lm, vocab_size=known),
            image_token_id=ids[_IMAGE],
            eoc_token_id=ids[_EOC],
            learnt_token_ids=tuple(sorted(each for each in ids.values() if each >= known)),
        )

    def batches(self, config: FlamingoConfig) -> Mapping[str, Batch]:
        """Of each pass over a dataset of a config that `config` returned.

        Raises:
            ConfigError: shards that there are not.
            StreamError: a dataset that can't be read.
        """
        found = {}
        for name, sizes in self._scale.passes(config).items():
            dataset = DatasetConfig(
                name=name,
                kind=_KINDS.get(name, "image_text"),
                shards=(str(self.folder / f"{name.partition('.')[0]}-*.tar"),),
                batch_size=sizes.samples,
                max_tokens=sizes.tokens,
                max_images=sizes.media,
                num_frames=sizes.frames,
                shuffle=False,
            )
            train = TrainConfig(
                model="", tokenizer="", datasets=(dataset,), steps=1, out="", eoc_token=_EOC
            )
            stream = make_stream(dataset, train, config, self._tokenizer)
            try:
                # A second pass over the same shards has other samples.
                index = int(name.partition(".")[2] or 0)
                batch = next(itertools.islice(stream, index, None))
            finally:
                stream.close()
            found[name] = batch.to(self._device)
        return found
