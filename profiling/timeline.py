"""A picture of one step: ranges by their nesting, and GPU work by its stream."""

from collections import defaultdict
from typing import Any

from flamingo_fast.bench.plot import import_pyplot
from flamingo_fast.profiling.analysis import Analysis, kernel_base, kind
from flamingo_fast.profiling.traces import GpuWork, Range

# Parts of the step's width: neighbours nearer than that are drawn as one, and what is narrower
# than a name has no name in it.
_APART = 1 / 2000
_CHARACTER = 1 / 150
_LEGEND = 16


def draw(analysis: Analysis) -> Any:
    """A figure of matplotlib: the step whose time is nearest to the median.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = import_pyplot()
    step = min(analysis.trace.steps, key=lambda each: abs(each.ns - analysis.step_s * 1e9))
    rows = _range_rows(analysis, step) | _stream_rows(analysis, step)
    longest: dict[str, float] = defaultdict(float)
    for bars in rows.values():
        for _, width, name in bars:
            longest[_colour_key(name)] += width
    colours = {
        name: pyplot.get_cmap("tab20")(index % 20)
        for index, name in enumerate(sorted(longest, key=lambda each: -longest[each]))
    }
    figure, axis = pyplot.subplots(
        figsize=(14, 1.6 + 0.34 * len(rows) + 0.22 * (min(len(colours), _LEGEND) // 4)),
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for row, bars in enumerate(rows.values()):
        spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for start, width, name in bars:
            spans[name].append((start, width))
            if width * 1e6 / step.ns > _CHARACTER * (len(name) + 1):
                axis.text(
                    *(start + width / 2, row, name),
                    **{"ha": "center", "va": "center", "fontsize": 7, "clip_on": True},
                )
        for name, of_name in spans.items():
            drawn = axis.broken_barh(
                of_name,
                (row - 0.43, 0.86),
                facecolors=colours[_colour_key(name)],
                # Of a backward the colour of its forward, paler.
                alpha=0.55 if name.endswith(" backward") else 1,
                edgecolor="white",
                linewidth=0.3,
            )
            handles.setdefault(_colour_key(name), drawn)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, step.ns / 1e6)
    axis.set_xlabel("ms since the step began", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    shown = [name for name in colours if name in handles][:_LEGEND]
    figure.legend(
        *([handles[name] for name in shown], [name[:48] for name in shown]),
        **{"loc": "outside lower center", "ncols": 4, "fontsize": 7},
    )
    return figure


def _colour_key(name: str) -> str:
    return name.removesuffix(" backward")


_Rows = dict[str, list[tuple[float, float, str]]]


def _range_rows(analysis: Analysis, step: Range) -> _Rows:
    inside = [each for each in analysis.trace.ranges if each.root is step]
    by_depth: dict[int, list[Range]] = defaultdict(list)
    for each in inside:
        by_depth[each.depth].append(each)
    return {
        "CPU" if depth == 0 else " " * depth: _bars(by_depth[depth], step, kind)
        for depth in sorted(by_depth)
    }


def _stream_rows(analysis: Analysis, step: Range) -> _Rows:
    by_stream: dict[tuple[int, int], list[GpuWork]] = defaultdict(list)
    for each in analysis.trace.work:
        if each.start < step.end and each.end > step.start:
            by_stream[each.device, each.stream].append(each)
    return {
        f"GPU {device}, stream {stream}": _bars(by_stream[device, stream], step, kernel_base)
        for device, stream in sorted(by_stream)
    }


def _bars(spans: list[Any], step: Range, name_of: Any) -> list[tuple[float, float, str]]:
    """(start, width, name) in ms; thousands of bars of one name side by side become few."""
    found: list[tuple[int, int, str]] = []
    for each in sorted(spans, key=lambda each: each.start):
        name = name_of(each.name)
        start, end = max(each.start, step.start), min(each.end, step.end)
        near = found and start - found[-1][1] < _APART * step.ns
        # A bar that can't be seen takes its neighbour's colour.
        if near and (
            found[-1][2] == name and isinstance(each, GpuWork) or _is_thin(found[-1], step)
        ):
            found[-1] = found[-1][0], max(end, found[-1][1]), name
        else:
            found.append((start, end, name))
    return [
        ((start - step.start) / 1e6, max((end - start) / 1e6, _APART * step.ns / 1e6), name)
        for start, end, name in found
    ]


def _is_thin(bar: tuple[int, int, str], step: Range) -> bool:
    return bar[1] - bar[0] < _APART * step.ns
