"""A picture of a layout."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flamingo_fast.layout.media_layout import MediaLayout


def plot(layout: "MediaLayout", sample: int, ax: Any) -> Any:
    """See `MediaLayout.plot`."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise ImportError(
            "MediaLayout.plot needs matplotlib: pip install 'flamingo_fast[bench]'"
        ) from None
    if not 0 <= sample < layout.batch_size:
        raise IndexError(f"sample: expected 0 to {layout.batch_size - 1}, got {sample}")
    num_media = int(layout.cu_media[sample + 1] - layout.cu_media[sample])
    mask = layout.to_mask()[sample, :, :num_media].cpu()
    if ax is None:
        ax = plt.figure(figsize=(8, 1.5 + min(num_media, 24) / 6), layout="constrained").gca()
    extent = (-0.5, layout.seqlen - 0.5, max(num_media, 1) - 0.5, -0.5)
    image = mask.T.numpy() if num_media else torch.zeros(1, max(layout.seqlen, 1)).numpy()
    ax.imshow(image, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, extent=extent)
    ax.set_xlabel("text token")
    ax.set_ylabel("medium")
    ax.yaxis.get_major_locator().set_params(integer=True)
    silent = int((~layout.attends()[sample]).sum())
    ax.set_title(f"sample {sample}: {layout.seqlen} tokens, {silent} attend to nothing")
    return ax
