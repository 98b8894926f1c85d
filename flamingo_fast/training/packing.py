"""Which documents share a row."""

from collections.abc import Sequence


def fullest(lengths: Sequence[int], room: int, *, with_first: bool = False) -> list[int]:
    """Which documents together fill a row best.

    Exact, over all subsets: with a dozen short captions at hand a row is nearly always full. Of
    equally full rows it is the one with the earliest documents. The work is lengths * room bits.

    Arguments:
        lengths: tokens of each document, at least 1.
        room: tokens that are free.
        with_first: whether the first document has to be among them, so that none waits for ever.

    Returns:
        Indices of `lengths`, rising; none if nothing fits.

    Raises:
        ValueError: the first one has to be among them and does not fit.
    """
    if with_first and lengths[0] > room:
        raise ValueError(f"lengths: expected the first to be at most {room}, got {lengths[0]}")
    # Bit n: some of the documents so far have n tokens together.
    fits = (1 << room + 1) - 1
    sums = [1]
    for i, length in enumerate(lengths):
        with_it = sums[-1] << length & fits
        sums.append(with_it if with_first and i == 0 else sums[-1] | with_it)
    total = sums[-1].bit_length() - 1
    chosen = []
    for i in reversed(range(len(lengths))):
        if not sums[i] >> total & 1 or (with_first and i == 0):
            chosen.append(i)
            total -= lengths[i]
    return chosen[::-1]
