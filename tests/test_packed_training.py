"""The benchmark of packed rows: which pairs share a row, and what it says of them."""

import torch

from flamingo_fast.bench import packed_training
from flamingo_fast.bench.pairs import MEAN_TOKENS, text_lengths


def test_every_text_is_in_a_row_that_has_room_for_it():
    for row_tokens in MEAN_TOKENS:
        lengths = text_lengths((200, row_tokens)).tolist()
        rows = packed_training.rows_of(lengths, row_tokens)
        assert sorted(each for row in rows for each in row) == list(range(200))
        filled = [sum(lengths[each] for each in row) for row in rows]
        assert max(filled) <= row_tokens
        assert sum(filled) > 0.95 * len(rows) * row_tokens


def test_what_is_measured():
    """Of a few pairs, in a few rounds; packed rows have the padded ones' loss, or it fails."""
    results = packed_training.run(torch.device("cpu"), pairs=4, budget_s=0.0, of_features=[True])
    assert [each.row_tokens for each in results] == [64, 32]
    for each in results:
        assert each.rows[0] == 4 > each.rows[1]
        assert each.padding[0] > each.padding[1]
        assert each.gain.samples >= 5
    assert len(packed_training.table(results).rows) == 2
