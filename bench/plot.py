"""The plot of a run: how near each provider comes to the measured copy bandwidth."""

from pathlib import Path
from typing import Any

from flamingo_fast.bench.run import Results


def import_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only.

    Raises:
        ImportError: matplotlib is not installed; names the extra.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("the plot needs matplotlib: pip install 'flamingo_fast[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results: Results, path: Path) -> None:
    """A panel for each shape (down), dtype and mode (across); a bar for each op and provider.

    Bars are medians with p20 to p80, labelled with the speed-up over the baseline. Without any
    number there is no plot, nor one of an earlier run.
    """
    pyplot = import_pyplot()
    values = {
        (m.metric, m.kernel, m.provider, m.mode, m.shape, m.dtype): m.value
        for m in results.measurements
        if m.metric in ("bandwidth", "speedup") and m.shape
    }
    if not values:
        path.unlink(missing_ok=True)
        return
    columns = zip(*values, strict=True)
    _, kernels, providers, modes, shapes, dtypes = (list(dict.fromkeys(c)) for c in columns)
    across = [(dtype, mode) for dtype in dtypes for mode in modes]
    figure, axes = pyplot.subplots(
        len(shapes),
        len(across),
        figsize=(1.5 + 3.6 * len(across), 1.6 + 0.22 * len(kernels) * len(providers) * len(shapes)),
        sharex="col",
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    height = 0.8 / len(providers)
    for row, shape in zip(axes, shapes, strict=True):
        for axis, (dtype, mode) in zip(row, across, strict=True):
            axis.set_title(f"{shape} {dtype} {mode}", fontsize=9)
            ceiling = axis.axvline(results.ceilings.copy.p50, color="black", linestyle="--", lw=1)
            for index, provider in enumerate(providers):
                found = [
                    (y + (index - (len(providers) - 1) / 2) * height, bandwidth, speedup)
                    for y, kernel in enumerate(kernels)
                    if (case := (kernel, provider, mode, shape, dtype))
                    and (bandwidth := values.get(("bandwidth", *case)))
                    and (speedup := values.get(("speedup", *case)))
                ]
                if not found:
                    continue
                positions, bandwidths, speedups = zip(*found, strict=True)
                bars = axis.barh(
                    positions,
                    [value.p50 for value in bandwidths],
                    height,
                    xerr=(
                        [value.p50 - value.p20 for value in bandwidths],
                        [value.p80 - value.p50 for value in bandwidths],
                    ),
                    error_kw={"lw": 0.8},
                    color=f"C{index}",
                    label=provider,
                )
                labels = [f" {value.p50:.2f}x" for value in speedups]
                axis.bar_label(bars, labels, fontsize=7, padding=2)
            axis.set_yticks(range(len(kernels)), kernels, fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
            axis.margins(x=0.2)
    axes[0][0].invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("useful GB/s", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        [*handles, ceiling],
        [*labels, "measured copy"],
        loc="outside lower center",
        ncols=len(labels) + 1,
        fontsize=8,
    )
    figure.suptitle(str(results.environment), fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
