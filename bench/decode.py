"""Work of a new token against the media before it: a media K/V cache, and none.

Without one each token projects all media anew for each layer, as models do whose language model
alone has a cache (OpenFlamingo). Counted by PyTorch's flop counter; attention over media, which is
one operation to it, by how many media the token attends to.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from flamingo_fast.bench.plot import import_pyplot
from flamingo_fast.models.conditioning import MediaContext
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.generation import Decoder

CACHED, RECOMPUTED = "media K/V cache", "K/V made for each token"


@torch.no_grad()
def decode_flops(
    model: Flamingo, num_media: int, *, seqlen: int = 64, recompute: bool = False
) -> int:
    """Of one token after a text of `seqlen` tokens, `num_media` of which are image tokens.

    Arguments:
        model: of any kind, on a CPU or GPU.
        recompute: whether it makes the keys and values of all media again.

    Raises:
        ValueError: seqlen: expected more tokens than media.
    """
    if num_media >= seqlen:
        raise ValueError(f"seqlen: expected more than {num_media} tokens, got {seqlen}")
    embedding = model.lang_model.get_input_embeddings().weight
    other = 0 if model.config.image_token_id else 1
    input_ids = torch.full((1, seqlen), other, device=embedding.device)
    input_ids[:, :num_media] = model.config.image_token_id
    shape = (num_media, model.config.resampler.num_latents, model.dim_media)
    media = torch.zeros(shape, dtype=embedding.dtype, device=embedding.device)
    cache = model.new_cache(1)
    model(input_ids, media=media, num_media=[num_media], cache=cache, logits_to_keep=1)
    decoder = Decoder(model, cache, room=1)
    with FlopCounterMode(display=False) as counter:
        if recompute:
            media_kv = model.conditioning.project(media)
            decoder.context = MediaContext(decoder.context.layout, media_kv=media_kv)
        decoder(input_ids[:, -1])
    conditioning = model.config.conditioning
    keys = int(decoder.context.layout.to_mask().sum()) * media.shape[1]
    # Two products of query and keys, and of weights and values.
    attention = 4 * keys * conditioning.heads * conditioning.dim_head
    return counter.get_total_flops() + attention * len(model.conditioning.blocks)


def decode_work(model: Flamingo, numbers: Sequence[int]) -> dict[str, list[int]]:
    """`decode_flops` after each of these numbers of media, by whether K/V are kept."""
    seqlen = max(numbers) + 1
    return {
        name: [
            decode_flops(model, number, seqlen=seqlen, recompute=recompute) for number in numbers
        ]
        for name, recompute in ((CACHED, False), (RECOMPUTED, True))
    }


def plot_decode_work(
    path: Path, model: Flamingo | None = None, numbers: Sequence[int] = (1, 2, 4, 8, 16, 32)
) -> dict[str, list[int]]:
    """Draws `decode_work` into a file, and returns it; by default of flamingo-mini.

    Raises:
        ImportError: matplotlib, or what the model needs, is not installed.
    """
    pyplot = import_pyplot()
    if model is None:
        model = Flamingo(FlamingoConfig.preset("flamingo-mini")).eval()
    work = decode_work(model, numbers)
    figure, axis = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    for name, flops in work.items():
        axis.plot(numbers, [each / 1e6 for each in flops], marker="o", label=name)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("media before the token")
    axis.set_ylabel("MFLOP of a token")
    axis.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return work
