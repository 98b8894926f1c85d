"""Packed rows of whole models: losses and gradients are those of each document in a row of its own.

And what training asks of a model beside: features in place of images, whose media each row attends
to, sums of losses, and text without media.
"""

import dataclasses

import pytest
import torch
from model_cases import FAMILIES, IMAGE, flamingo, open_gates
from torch import nn

KINDS = ["gated_xattn_dense", "vanilla_xattn", "grafting"]
ROW = 24
# Rows of documents, "i" being an image token and what each attends to: "p" previous or "n" next.
DOCUMENTS = [
    [("i....i...", "n"), ("......", "p"), ("i...", "p")],
    [("..i...i.i.", "p"), ("i......", "n"), ("i..", "p"), (".", "p")],
    [("ii....", "n")],
]
ATTEND = {"p": "previous", "n": "next"}


@dataclasses.dataclass
class Packed:
    """The same documents packed, and as rows of their own, padded at the end."""

    packed: dict
    padded: dict


def _packed(frames=lambda medium: 1, pad_documents=True):
    """`frames`: of each medium."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(DOCUMENTS), ROW, dtype=torch.int64)
    documents, cu_seqlens = [], [0]
    for row, texts in enumerate(DOCUMENTS):
        start = 0
        for text, attend in texts:
            tokens = torch.randint(5, 40, (len(text),), generator=generator)
            tokens[[token == "i" for token in text]] = IMAGE
            ids[row, start : start + len(text)] = tokens
            documents.append((tokens, ATTEND[attend]))
            start += len(text)
            cu_seqlens.append(row * ROW + start)
        if pad_documents or row + 1 < len(DOCUMENTS):
            documents.append((tokens[:0], "previous"))
            cu_seqlens.append((row + 1) * ROW)
    counts = [int((tokens == IMAGE).sum()) for tokens, _ in documents]
    media = [
        torch.randn(frames(medium), 3, 8, 8, generator=generator) for medium in range(sum(counts))
    ]
    if len({len(medium) for medium in media}) == 1:
        media = torch.stack(media)
    real = [index for index, (tokens, _) in enumerate(documents) if len(tokens)]
    alone = nn.utils.rnn.pad_sequence([documents[index][0] for index in real], batch_first=True)
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones_like(documents[index][0]) for index in real], batch_first=True
    )
    # Image tokens and some others are not predicted.
    skipped = [IMAGE, 7, 8, 9]
    labels = ids.masked_fill(torch.isin(ids, torch.tensor(skipped)) | (ids == 0), -100)
    alone_labels = alone.masked_fill(torch.isin(alone, torch.tensor(skipped)) | (mask == 0), -100)
    packed = {
        "input_ids": ids,
        "labels": labels,
        "cu_seqlens": torch.tensor(cu_seqlens, dtype=torch.int32),
        "num_media": counts,
        "attend": [attend for _, attend in documents],
        "videos": media,
    }
    padded = {
        "input_ids": alone,
        "labels": alone_labels,
        "attention_mask": mask,
        "num_media": [counts[index] for index in real],
        "attend": [documents[index][1] for index in real],
        "videos": media,
    }
    return Packed(packed, padded)


def _gradients(model, arguments):
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _assert_same(model, case, rtol=1e-4):
    """Of gradients relative to the largest of each parameter."""
    expected, expected_gradients = _gradients(model, case.padded)
    loss, gradients = _gradients(model, case.packed)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(
            gradients[name],
            gradient,
            rtol=rtol,
            atol=rtol * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    return gradients


def _model(family, kind="gated_xattn_dense", **options):
    if (family, kind) == ("gpt_neox", "vanilla_xattn"):
        options["use_parallel_residual"] = False
    return open_gates(flamingo(family, kind, **options)).train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [*FAMILIES, "chinchilla"])
def test_packed_documents_are_as_rows_of_their_own(family, kind):
    _assert_same(_model(family, kind), _packed())
