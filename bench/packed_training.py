"""Training on image-text pairs: several in a row, or each in a row of its own, padded.

A forward and a backward of flamingo-mini on pairs with the paper's text lengths (`pairs`), the same
pairs and as many tokens in a row either way. Rows are packed as in training, by those that fill a
row best among the next few.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flamingo_fast.bench.pairs import MEAN_TOKENS, text_lengths
from flamingo_fast.bench.tables import Table
from flamingo_fast.bench.timing import Quantiles, device_clock, interleaved, paired_ratios
from flamingo_fast.models.config import FlamingoConfig
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.training.packing import fullest

_PAIRS = 64
_FEWEST_ROUNDS = 5
_LOOK_AHEAD = 16
_DATASETS = {64: "LTIP", 32: "ALIGN"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one dataset, with images through the vision encoder or their features given.

    Attributes:
        row_tokens: tokens of a row, padding among them.
        rows: numbers of rows, padded and packed; padding: the shares of padding in them.
        tokens_per_s: of tokens that are no padding, padded and packed.
        gain: how many times more packed rows have, by rounds.
    """

    row_tokens: int
    of_features: bool
    rows: tuple[int, int]
    padding: tuple[float, float]
    tokens_per_s: tuple[Quantiles, Quantiles]
    gain: Quantiles


def rows_of(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Which of the texts share a row."""
    rows: list[list[int]] = []
    waiting: list[int] = []
    upcoming = iter(range(len(lengths)))
    while True:
        waiting += itertools.islice(upcoming, _LOOK_AHEAD - len(waiting))
        if not waiting:
            return rows
        chosen = fullest([lengths[each] for each in waiting], row_tokens, with_first=True)
        rows.append([waiting[each] for each in chosen])
        waiting = [each for index, each in enumerate(waiting) if index not in chosen]


def _arguments(
    lengths: list[int], row_tokens: int, rows: list[list[int]], config: FlamingoConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a call with padded rows and of one with packed ones, without media."""
    generator = torch.Generator().manual_seed(0)
    # Ids 10 and up are no special tokens.
    texts = [torch.randint(10, config.lm.vocab_size, (n,), generator=generator) for n in lengths]
    for text in texts:
        text[0] = config.image_token_id

    def arguments(rows: list[list[int]]) -> dict[str, Any]:
        ids = torch.zeros(len(rows), row_tokens, dtype=torch.int64)
        is_text = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        cu_seqlens, num_media = [0], []
        for row, members in enumerate(rows):
            start = 0
            for text in (texts[each] for each in members):
                here = slice(start, start + len(text))
                ids[row, here], is_text[row, here] = text, 1
                labels[row, here.start + 1 : here.stop] = text[1:]
                start = here.stop
                cu_seqlens.append(row * row_tokens + start)
                num_media.append(1)
            cu_seqlens.append((row + 1) * row_tokens)
            num_media.append(0)
        arguments = {"input_ids": ids, "labels": labels}
        if len(rows) == len(texts):
            return {**arguments, "attention_mask": is_text, "num_media": [1] * len(rows)}
        return {**arguments, "cu_seqlens": torch.tensor(cu_seqlens), "num_media": num_media}

    return arguments([[index] for index in range(len(texts))]), arguments(rows)


def _measure(
    model: Flamingo, row_tokens: int, of_features: bool, pairs: int, budget_s: float
) -> Measured:
    device = next(model.parameters()).device
    lengths = text_lengths((pairs, row_tokens)).tolist()
    rows = rows_of(lengths, row_tokens)
    on_device = ("input_ids", "labels", "attention_mask")
    padded, packed = (
        {name: each.to(device) if name in on_device else each for name, each in arguments.items()}
        for arguments in _arguments(lengths, row_tokens, rows, model.config)
    )
    size = model.config.vision.image_size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(pairs, 3, size, size, generator=generator).to(device)
    # Images and features in the order of the texts, which is another one where rows are packed.
    order = torch.tensor(list(itertools.chain(*rows)), device=device)
    if of_features:
        with torch.no_grad():
            features = model.vision_encoder(pixels)[:, None]
        padded["features"], packed["features"] = features, features[order]
    else:
        padded["images"], packed["images"] = pixels, pixels[order]

    def step(arguments: dict[str, Any]) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            loss = model(**arguments).loss
            loss.backward()
            return loss.detach()

        return call

    calls = {"padded": step(padded), "packed": step(packed)}
    losses = [float(call()) for call in calls.values()]
    if abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]):
        raise RuntimeError(f"packed rows have another loss than padded ones: {losses}")
    clock = device_clock(device)
    samples = interleaved(calls, clock, budget_s=budget_s, fewest_rounds=_FEWEST_ROUNDS)
    total = sum(lengths)
    return Measured(
        row_tokens,
        of_features,
        (pairs, len(rows)),
        (1 - total / (pairs * row_tokens), 1 - total / (len(rows) * row_tokens)),
        (
            Quantiles.of(total / second for second in samples["padded"]),
            Quantiles.of(total / second for second in samples["packed"]),
        ),
        paired_ratios(samples["padded"], samples["packed"]),
    )


def run(
    device: torch.device,
    *,
    pairs: int = _PAIRS,
    budget_s: float = 20.0,
    of_features: Sequence[bool] = (False, True),
) -> list[Measured]:
    """In fp32, of the paper's two datasets of pairs; `budget_s` seconds each, or five rounds.

    Raises:
        RuntimeError: packed rows have another loss.
    """
    torch.manual_seed(0)
    model = Flamingo(FlamingoConfig.preset("flamingo-mini"), device=device).train()
    return [
        _measure(model, row_tokens, each, pairs, budget_s)
        for row_tokens in MEAN_TOKENS
        for each in of_features
    ]


def table(measured: list[Measured]) -> Table:
    """A row for each, padded | packed."""
    rows = []
    for each in measured:
        mean = MEAN_TOKENS[each.row_tokens]
        rows.append(
            [
                f"{_DATASETS[each.row_tokens]}, {mean} of {each.row_tokens} tokens",
                "features" if each.of_features else "encoded",
                ", ".join(map(str, each.rows)),
                ", ".join(f"{share:.1%}" for share in each.padding),
                ", ".join(f"{rate.p50:,.0f}" for rate in each.tokens_per_s),
                f"{each.gain.p50:.2f}",
                f"{each.gain.p20:.2f} - {each.gain.p80:.2f}",
            ]
        )
    return Table(
        "flamingo-mini, forward and backward: padded, packed rows",
        ("pairs", "images", "rows", "padding", "tokens/s", "x", "20 - 80 %"),
        rows,
        2,
    )
