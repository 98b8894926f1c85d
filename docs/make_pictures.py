"""Makes the pictures of the documentation: `python docs/make_pictures.py`, into docs/pictures.

Layouts are drawn by their own `plot`; schedules from the schedule that a layout has; measurements
from the files that the benchmarks wrote, in bench/data.
"""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from flamingo_fast import MediaLayout

FOLDER = Path(__file__).parent / "pictures"
DATA = Path(__file__).parents[1] / "bench" / "data"
DPI = 90
GREY = "0.85"


def _locations(tokens: int, *images: int) -> torch.Tensor:
    """(1, L) bool, True at the image tokens."""
    locations = torch.zeros(1, tokens, dtype=torch.bool)
    locations[0, list(images)] = True
    return locations


def _plots(*layouts: tuple[str, MediaLayout]) -> Figure:
    """One below the other, each by its `plot`."""
    heights = [1.3 + layout.max_media / 6 for _, layout in layouts]
    figure, axes = plt.subplots(
        len(layouts),
        figsize=(8, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, layout) in zip(axes[:, 0], layouts, strict=True):
        layout.plot(ax=axis)
        axis.set_title(f"{title}: {axis.get_title().partition(': ')[2]}", fontsize=10)
    return figure


def attend() -> Figure:
    """The three image-causal layouts of the same text."""
    locations = _locations(48, 6, 14, 30)
    return _plots(
        *(
            (f'attend="{mode}"', MediaLayout.from_media_locations(locations, 3, mode))
            for mode in ("previous", "next", "all_previous")
        )
    )


def past_last() -> Figure:
    """More image tokens than media."""
    locations = _locations(48, 6, 14, 30)
    return _plots(("3 image tokens, 2 media", MediaLayout.from_media_locations(locations, 2)))


def masks() -> Figure:
    """A mask with holes, and one of tiles."""
    first_and_last = torch.eye(4, dtype=torch.bool).repeat_interleave(12, 0)
    first_and_last[:, 0] = True
    tiles = torch.zeros(1, 48, 2, 4, dtype=torch.long)
    tiles[:, 8:, 0, :2] = 1
    tiles[:, 28:, 1, :3] = 1
    return _plots(
        ("from_media_mask, first and last", MediaLayout.from_media_mask(first_and_last[None])),
        ("from_tile_mask", MediaLayout.from_tile_mask(tiles, tokens_per_tile=17)),
    )


def packed() -> Figure:
    """Three documents in a row: neither text nor media of others."""
    locations = _locations(48, 0, 12, 18, 30, 36)
    layout = MediaLayout.packed(
        locations,
        cu_seqlens=[0, 12, 30, 48],
        num_media=[1, 2, 2],
        attend=["previous", "next", "previous"],
    )
    return _plots(("packed", layout))


def one_medium_schedule() -> Figure:
    """Which rows the programs of the kernels for one medium a token take, in their order."""
    layout = MediaLayout.from_media_locations(_locations(768, 40, 160, 664), 3)
    assert layout.work_items is not None
    items = [item for item in layout.work_items.tolist() if item[1] < item[2]]
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for place, (medium, first, end, slot) in enumerate(items):
        color = GREY if medium < 0 else f"C{medium}"
        axis.barh(place, end - first, left=first, color=color, height=0.8)
        text = "writes zeros" if medium < 0 else f"K, V of medium {medium}"
        text += f"; partial sums {slot}" if slot >= 0 else ""
        after = end + 5 if end < layout.seqlen // 2 else first - 5
        side = "left" if end < layout.seqlen // 2 else "right"
        axis.text(after, place, text, va="center", ha=side, fontsize=9)
    axis.set_xlim(0, layout.seqlen)
    axis.set_yticks(range(len(items)))
    axis.invert_yaxis()
    axis.set_xlabel("query rows (text tokens)")
    axis.set_ylabel("program of a key/value head")
    return figure


def several_media_schedule() -> Figure:
    """What blocks of query rows of the kernels for several media a token walk."""
    rows = 32
    locations = _locations(256, 10, 40, 70, 100, 150, 180, 210)
    layout = MediaLayout.from_media_locations(locations, 7, "all_previous")
    mask = layout.to_mask()[0]
    figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
    for block in range(math.ceil(layout.seqlen / rows)):
        of_block = mask[block * rows : (block + 1) * rows]
        for medium in range(layout.max_media):
            attends = of_block[:, medium]
            style: dict[str, Any] = {"facecolor": "white"}
            if attends.any():
                style = {"facecolor": "C0"} if attends.all() else {"facecolor": "C1"}
            place = (block * rows, medium - 0.5)
            axis.add_patch(plt.Rectangle(place, rows, 1, edgecolor=GREY, **style))
    names = {"C0": "walked", "C1": "walked, some rows masked", "white": "left out"}
    axis.legend(
        [plt.Rectangle((0, 0), 1, 1, facecolor=each, edgecolor=GREY) for each in names],
        list(names.values()),
        loc="upper center",
        bbox_to_anchor=(0.5, 1.2),
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    axis.set_xlim(0, layout.seqlen)
    axis.set_ylim(layout.max_media - 0.5, -0.5)
    axis.set_xticks(range(0, layout.seqlen + 1, rows))
    axis.set_xlabel("query rows: a program has a block of them")
    axis.set_ylabel("media")
    return figure


def table3_and_growth() -> Figure:
    """Step times of table 3's rows beside the paper's, and an op's time by its number of images."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = _read("table3_mini.csv")
    places = range(len(rows))
    measured = [float(row["measured_ratio"]) for row in rows]
    ends = [
        [value - float(row["low"]) for value, row in zip(measured, rows, strict=True)],
        [float(row["high"]) - value for value, row in zip(measured, rows, strict=True)],
    ]
    left.barh(places, measured, xerr=ends, color="C0", height=0.6, label="measured, scale mini")
    paper = [float(row["paper_ratio"]) for row in rows]
    left.plot(paper, places, "D", color="C1", label="paper, full scale")
    left.set_yticks(places, [row["row"] for row in rows], fontsize=8)
    left.invert_yaxis()
    left.axvline(1, color="0.5", linewidth=0.8)
    left.set_xlabel("step time over the baseline's")
    left.set_title("Table 3", fontsize=10)
    left.legend(fontsize=8, loc="center right")

    times: dict[str, list[tuple[int, float]]] = {}
    for row in _read("growth.csv"):
        sizes = [int(each) for each in row["shape"].split("x")]
        if row["metric"] == "time" and sizes[1] == _GROWTH_TOKENS:
            times.setdefault(row["provider"], []).append((sizes[2], float(row["p50"])))
    for provider, points in times.items():
        label = _PROVIDERS[provider]
        right.plot(*zip(*sorted(points), strict=True), marker=".", label=label)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    right.set_xlabel(f"images of 64 tokens in {_GROWTH_TOKENS} text tokens")
    right.set_ylabel("ms, forward and backward, 2 CPU cores, fp32")
    right.set_title("masked cross-attention", fontsize=10)
    right.legend(fontsize=8)
    return figure


_GROWTH_TOKENS = 2048
_PROVIDERS = {
    "eager": "OpenFlamingo's computation",
    "sdpa": "PyTorch's attention, dense mask",
    "ours": "flamingo_fast",
}


def _read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


RECIPES: dict[str, Callable[[], Figure]] = {
    "attend.png": attend,
    "past_last.png": past_last,
    "masks.png": masks,
    "packed.png": packed,
    "one_medium_schedule.png": one_medium_schedule,
    "several_media_schedule.png": several_media_schedule,
    "table3_and_growth.png": table3_and_growth,
}


def save(name: str, folder: Path) -> Path:
    """Makes one picture; without a date in it."""
    with plt.style.context("default"):
        figure = RECIPES[name]()
        figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
        plt.close(figure)
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: docs/pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        print(save(name, out))


if __name__ == "__main__":
    main()
