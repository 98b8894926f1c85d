"""What the demo freezes: a language model of text alone, and a vision encoder of images and texts.

n images, L tokens.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flamingo_fast.models.chinchilla import ChinchillaLM
from flamingo_fast.models.config import LanguageModelConfig, VisionConfig
from flamingo_fast.models.vision import VisionEncoder
from flamingo_fast.ops.linear_cross_entropy import linear_cross_entropy
from flamingo_fast.training.batch import IGNORED
from flamingo_fast.training.demo.language import corpus_document

Progress = Callable[[str], None]

_LM_LR = 3e-3
# Items of a text and texts of a batch. Long ones, every other batch, are for prompts of 32 shots.
_SHORT, _LONG = (9, 32), (34, 12)
_INIT_FACTOR = 5.0
_VISION_LR = 3e-3
_VISION_BATCH = 128
_EMBED_DIM = 64
# Of the contrastive loss; CLIP starts with 1 / 0.07 and learns it too.
_INVERSE_TEMPERATURE = 10.0
# How images are turned (radians), scaled, and moved (halves of an image) at most.
_TURN, _SCALE, _MOVE = 0.26, 0.12, 0.2


def pretrain_language_model(
    config: LanguageModelConfig,
    tokenizer: Any,
    steps: int,
    seed: int,
    progress: Progress = lambda line: None,
) -> tuple[ChinchillaLM, list[float]]:
    """A language model that has read lists of digits' texts, and its losses.

    Arguments:
        config: its sizes.
        tokenizer: of its vocabulary.
        steps: updates.
        seed: of weights and texts.
        progress: is called with what to show of a step.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{seed}/text")
    model = ChinchillaLM(config)
    _widen(model)
    optimizer = torch.optim.AdamW(model.parameters(), _LM_LR, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(steps):
        _set_lr(optimizer, _LM_LR, step, steps)
        items, texts = _LONG if step % 2 else _SHORT
        documents = [corpus_document(rng, items) for _ in range(texts)]
        ids = [tokenizer(each)["input_ids"] for each in documents]
        shortest = min(map(len, ids))
        input_ids = torch.tensor([each[:shortest] for each in ids])
        hidden = model.model(input_ids).last_hidden_state
        labels = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
        loss = linear_cross_entropy(hidden, model.get_output_embeddings().weight, None, labels)
        _update(loss, optimizer, model.parameters())
        losses.append(loss.item())
        progress(f"step {step + 1} of {steps}, loss {losses[-1]:.3f}")
    return model.requires_grad_(False).eval(), losses


def pretrain_vision_encoder(
    config: VisionConfig,
    pixels: torch.Tensor,
    texts: Sequence[str],
    tokenizer: Any,
    epochs: int,
    seed: int,
    progress: Progress = lambda line: None,
) -> tuple[VisionEncoder, Callable[[torch.Tensor], torch.Tensor]]:
    """An encoder trained with texts, bags of words, as CLIP is (arXiv 2103.00020).

    Of a batch many images have the same text: all of these are right.

    Arguments:
        config: of the encoder.
        pixels: (n, 3, H, W), the training images alone.
        texts: of each.
        tokenizer: of the texts.
        epochs: over the images.
        seed: of weights, order and augmentation.
        progress: is called with what to show of an epoch.

    Returns:
        The encoder, frozen; and what says which of the different texts, in the order of
        `sorted(set(texts))`, images (n, 3, H, W) are most like: (n,) int64.
    """
    torch.manual_seed(seed)
    encoder = VisionEncoder(config)
    encoder.freeze(False)
    encoder.train()
    to_image = nn.Linear(encoder.features, _EMBED_DIM, bias=False)
    to_text = nn.EmbeddingBag(len(tokenizer), _EMBED_DIM)
    log_scale = nn.Parameter(torch.tensor(math.log(_INVERSE_TEMPERATURE)))
    parameters = [*encoder.parameters(), *to_image.parameters(), *to_text.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, _VISION_LR, weight_decay=0.05)

    captions = sorted(set(texts))
    kinds = torch.tensor([captions.index(text) for text in texts])
    ids = [torch.tensor(tokenizer(each)["input_ids"]) for each in captions]
    words = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    is_word = (words >= 0).float()

    def embed_images(pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(to_image(encoder(pixels).mean(1)), dim=-1)

    def embed_texts() -> torch.Tensor:
        summed = (F.embedding(words.clamp(min=0), to_text.weight) * is_word[..., None]).sum(1)
        return F.normalize(summed, dim=-1)

    @torch.no_grad()
    def classify(pixels: torch.Tensor) -> torch.Tensor:
        return (embed_images(pixels) @ embed_texts().T).argmax(1)

    batches = max(1, len(pixels) // _VISION_BATCH)
    step, steps = 0, epochs * batches
    for epoch in range(epochs):
        for rows in torch.randperm(len(pixels)).tensor_split(batches):
            _set_lr(optimizer, _VISION_LR, step, steps)
            of_images, of_texts = embed_images(_augment(pixels[rows])), embed_texts()[kinds[rows]]
            similarity = of_images @ of_texts.T * log_scale.exp()
            is_same = (kinds[rows][:, None] == kinds[rows]).float()
            target = is_same / is_same.sum(1, keepdim=True)
            loss = F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)
            _update(loss / 2, optimizer, parameters)
            step += 1
        progress(f"epoch {epoch + 1} of {epochs}, loss {loss.item() / 2:.3f}")
    encoder.freeze()
    encoder.eval()
    return encoder, classify


@torch.no_grad()
def _widen(model: ChinchillaLM) -> None:
    """Its matrices' initial values are of large models' size: in so few steps attention would stay
    uniform."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(_INIT_FACTOR)


def _augment(pixels: torch.Tensor) -> torch.Tensor:
    """(n, 3, H, W), a little turned, scaled and moved; not mirrored, which digits may not be."""
    turn, scale, *moves = torch.rand(4, len(pixels)) * 2 - 1
    turn, scale = turn * _TURN, 1 + scale * _SCALE
    x, y = (each * _MOVE for each in moves)
    rows = [turn.cos() * scale, -turn.sin(), x, turn.sin(), turn.cos() * scale, y]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """Linear warm-up, then linear down to almost nothing."""
    factor = min(1.0, (step + 1) / 50, max(0.02, 1 - step / steps))
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def _update(loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
