"""A training step of a row of table 3: its model, and batches of its datasets."""

from collections.abc import Mapping

import torch

from flamingo_fast.bench.table3_scales import WEIGHTS, Scale
from flamingo_fast.models import work
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import OptimizerConfig, ParallelConfig
from flamingo_fast.training.parallel import prepare
from flamingo_fast.training.step import TrainStep

PRECISIONS = {
    "fp32": "all is fp32",
    "bf16": "weights are bf16, with fp32 master weights, moments and gradients",
    "bf16 states": "trained weights, gradients and AdamW's moments are bf16, too, without fp32 "
    "master weights",
}


class Step:
    """A model with random weights, and its data; each call is a training step.

    Arguments:
        config: at this scale.
        batches: by dataset, or by each of its passes; None: synthetic ones.

    Attributes:
        train_step: has the model.
    """

    def __init__(
        self,
        config: FlamingoConfig,
        scale: Scale,
        device: torch.device,
        precision: str | None = None,
        batches: Mapping[str, Batch] | None = None,
    ) -> None:
        precision = precision or precision_of(scale, device)
        torch.manual_seed(0)
        if precision == "bf16 states":
            model = Flamingo(config, device=device, dtype=torch.bfloat16)
        else:
            model = Flamingo(config)
            prepare(model, ParallelConfig(fsdp=False), precision, device)
        passes = scale.passes(config)
        self.train_step = TrainStep(
            model,
            OptimizerConfig(),
            weights={name: WEIGHTS[name.partition(".")[0]] for name in passes},
            optimisation=config.optimisation,
            master_weights=precision != "bf16 states",
        )
        self.batches = dict(batches or synthetic_batches(config, scale, device))

    def __call__(self) -> None:
        """
        Raises:
            FloatingPointError: a loss or a gradient isn't finite: such a step makes no update.
        """
        if self.train_step(self.batches).skipped:
            raise FloatingPointError("a loss or a gradient is not finite")

    def static_bytes(self) -> int:
        """Weights, master weights and moments: what is there between steps."""
        model, state = self.train_step.model, self.train_step.state()
        tensors = [*model.parameters(), *model.buffers()]
        for values in (state["weights"], state["exp_avg"], state["exp_avg_sq"]):
            tensors += values.values()
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
        return sum(storage.nbytes() for storage in storages.values())


def precision_of(scale: Scale, device: torch.device) -> str:
    """On a GPU bf16 with fp32 master weights, as in the paper; on a CPU, slow in bf16 where models
    are small, fp32, and for the paper's own models bf16 alone, or 24 GB would not do."""
    if device.type == "cuda":
        return "bf16"
    return "bf16 states" if scale.name == "full" else "fp32"


def synthetic_batches(
    config: FlamingoConfig, scale: Scale, device: torch.device
) -> dict[str, Batch]:
    """Of each pass over a dataset."""
    passes = scale.passes(config)
    return {name: synthetic_batch(config, sizes, device) for name, sizes in passes.items()}


def synthetic_batch(config: FlamingoConfig, sizes: work.Batch, device: torch.device) -> Batch:
    """Random text, pixels and places of media: an `<EOC>` before each but the first (section 2.4).

    Of several media, text attends to the next one in half of the samples (appendix A.3.2), unless
    the config says all.
    """
    generator = torch.Generator().manual_seed(0)
    samples, tokens, media = sizes.samples, sizes.tokens, sizes.media
    ids = torch.randint(
        config.image_token_id + 2, config.lm.vocab_size, (samples, tokens), generator=generator
    )
    # The first medium comes first; the others are where there is place for their `<EOC>` too.
    for row in ids:
        places = 2 * torch.randperm((tokens - 1) // 2, generator=generator)[: media - 1] + 2
        row[0] = row[places] = config.image_token_id
        if config.eoc_token_id is not None:
            row[places - 1] = config.eoc_token_id
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    labels[:, 0] = -100
    size = config.vision.image_size
    shape = (samples * media, sizes.frames, 3, size, size)
    attend = None
    if media > 1 and config.conditioning.attend == "previous":
        attend = ["next" if sample % 2 else "previous" for sample in range(samples)]
    batch = Batch(
        input_ids=ids,
        labels=labels,
        attention_mask=None,
        cu_seqlens=None,
        num_media=[media] * samples,
        attend=attend,
        pixels=torch.randn(shape, generator=generator),
        features=None,
    )
    return batch.to(device)
