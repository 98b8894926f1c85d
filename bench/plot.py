"""The plots: how near each provider comes to the copy bandwidth, and what larger inputs cost."""

import textwrap
from typing import Any

from flamingo_fast.bench import growth
from flamingo_fast.bench.registry import shape_name
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


def plot(results: Results) -> Any:
    """A figure; None without any number.

    A panel for each shape (down), dtype and mode (across); a bar for each op and provider.

    Bars are medians with p20 to p80, labelled with the speed-up over the baseline.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    values = {
        (m.metric, m.kernel, m.provider, m.mode, m.shape, m.dtype): m.value
        for m in results.measurements
        if m.metric in ("bandwidth", "speedup") and m.shape
    }
    if not values:
        return None
    columns = zip(*values, strict=True)
    _, _, providers, modes, shapes, dtypes = (list(dict.fromkeys(c)) for c in columns)
    across = [(dtype, mode) for dtype in dtypes for mode in modes]
    # Of a shape only the ops and providers that have it: most have not.
    of_shape = {
        shape: [list(dict.fromkeys(case[i] for case in values if case[4] == shape)) for i in (1, 2)]
        for shape in shapes
    }
    bars_of_shape = [len(kernels) * len(present) for kernels, present in of_shape.values()]
    figure, axes = pyplot.subplots(
        len(shapes),
        len(across),
        figsize=(1.5 + 3.6 * len(across), 1.6 + sum(0.5 + 0.22 * bars for bars in bars_of_shape)),
        height_ratios=[2 + bars for bars in bars_of_shape],
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for row, (shape, (kernels, present)) in zip(axes, of_shape.items(), strict=True):
        height = 0.8 / len(present)
        for axis, (dtype, mode) in zip(row, across, strict=True):
            axis.set_title(f"{shape} {dtype} {mode}", fontsize=9)
            ceiling = axis.axvline(results.ceilings.copy.p50, color="black", linestyle="--", lw=1)
            for index, provider in enumerate(present):
                found = [
                    (
                        y + (index - (len(present) - 1) / 2) * height,
                        bandwidth,
                        values.get(("speedup", *case)),
                    )
                    for y, kernel in enumerate(kernels)
                    if (case := (kernel, provider, mode, shape, dtype))
                    and (bandwidth := values.get(("bandwidth", *case)))
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
                    color=f"C{providers.index(provider)}",
                )
                handles.setdefault(provider, bars)
                labels = [f" {value.p50:.2f}x" if value else "" for value in speedups]
                axis.bar_label(bars, labels, fontsize=7, padding=2)
            axis.set_yticks(range(len(kernels)), kernels, fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
            axis.margins(x=0.2)
        row[0].invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("useful GB/s", fontsize=8)
    figure.legend(
        [*handles.values(), ceiling],
        [*handles, "measured copy"],
        loc="outside lower center",
        ncols=len(handles) + 1,
        fontsize=8,
    )
    figure.suptitle(str(results.environment), fontsize=9)
    return figure


def plot_growth(results: Results, op: str) -> Any:
    """A figure; None without any number.

    Time and memory against each size that `op` was measured in; a line for each provider. Bands are
    p20 to p80.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    values = {
        (m.metric, m.dtype, m.mode, m.provider, m.shape): m.value
        for m in results.measurements
        if m.kernel == op and m.metric in ("time", "peak_memory")
    }
    if not values:
        return None
    _, dtypes, modes, providers, _ = (list(dict.fromkeys(c)) for c in zip(*values, strict=True))
    across = [(dtype, mode) for dtype in dtypes for mode in modes]
    dims = next(each.dims for each in results.plan.benchmarks if each.name == op)
    down = [
        (size, series, metric)
        for size, series in growth.series_of(results, op)
        for metric in ("time", "peak_memory")
    ]
    figure, axes = pyplot.subplots(
        len(down),
        len(across),
        figsize=(1.5 + 2.8 * len(across), 3 * len(down)),
        sharex="row",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (size, series, metric) in zip(axes, down, strict=True):
        unit = {"time": "ms", "peak_memory": "MB"}[metric]
        row[0].set_ylabel(f"{metric.replace('_', ' ')}, {unit}", fontsize=8)
        fixed = ", ".join(
            f"{name} {number}" for name, number in zip(dims, series[0], strict=True) if name != size
        )
        for axis, (dtype, mode) in zip(row, across, strict=True):
            axis.set_title(f"{dtype} {mode}\n{fixed}", fontsize=8)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_yscale("log")
            axis.tick_params(which="both", labelsize=8)
            axis.set_xlabel(growth.SIZES[size], fontsize=8)
            for index, provider in enumerate(providers):
                found = [
                    (shape[dims.index(size)], value)
                    for shape in series
                    if (value := values.get((metric, dtype, mode, provider, shape_name(shape))))
                ]
                counts = [count for count, _ in found]
                low, middle, high = (
                    [getattr(value, name) for _, value in found] for name in ("p20", "p50", "p80")
                )
                axis.plot(counts, middle, marker=".", color=f"C{index}", label=provider)
                axis.fill_between(counts, low, high, color=f"C{index}", alpha=0.3, lw=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    environment = textwrap.fill(str(results.environment), 28 * (1 + len(across)))
    figure.suptitle(f"{op}\n{environment}", fontsize=8)
    return figure
