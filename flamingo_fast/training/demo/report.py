"""The demo's table and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from flamingo_fast.models.extras import require
from flamingo_fast.training.demo.digits import load_digits
from flamingo_fast.training.demo.few_shot import Answer
from flamingo_fast.training.demo.language import TASKS
from flamingo_fast.training.demo.run import DemoResult

# Of a curve a point is the mean of so many steps.
_SMOOTH = 10
_CAPTIONED, _COLUMNS = 24, 8


def render(result: DemoResult) -> Group:
    """Accuracies by shots, the last gates, and what must hold."""
    accuracies = Table("exact match of held-out images", title="Few-shot accuracy")
    for shots in result.config.shots:
        accuracies.add_column(f"{shots} shots", justify="right")
    for task in TASKS:
        for is_shuffled in (False, True):
            values = [
                f"{result.accuracies[task.name, shots, is_shuffled]:.1%}"
                for shots in result.config.shots
            ]
            name = task.name.replace("_", " ")
            accuracies.add_row(f"{name}, images shuffled" if is_shuffled else name, *values)
    gates = Table("tanh of the last gates", title="Gates")
    for layer in range(len(result.gates["attention"][-1])):
        gates.add_column(f"layer {layer}", justify="right")
    for kind, steps in result.gates.items():
        gates.add_row(kind, *(f"{gate:+.3f}" for gate in steps[-1]))
    checks = Table("must hold", "found", "", title="Checks")
    for check in result.checks():
        verdict = "[green]yes[/green]" if check.holds else "[red]NO[/red]"
        checks.add_row(check.claim, check.found, verdict)
    seconds, cpu_seconds = (sum(each.values()) for each in (result.seconds, result.cpu_seconds))
    took = f"{seconds:.0f} s in all, {cpu_seconds:.0f} s of the CPU"
    return Group(accuracies, gates, checks, took)


def plot(result: DemoResult, folder: Path) -> list[Path]:
    """training.png, with losses, accuracies and gates; captions.png, with held-out images.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "demo").use("Agg")
    pyplot = require("matplotlib.pyplot", "demo")
    paths = [folder / "training.png", folder / "captions.png"]
    _plot_training(pyplot, result, paths[0])
    _plot_captions(pyplot, result, paths[1])
    return paths


def _plot_training(pyplot: Any, result: DemoResult, path: Path) -> None:
    figure, ((text, loss), (shots, gates)) = pyplot.subplots(
        2, 2, figsize=(11, 8), layout="constrained"
    )
    text.plot(*_smooth(result.lm_losses), color="C7")
    text.set(title="language model, text alone", xlabel="step", ylabel="loss")

    for index, (name, losses) in enumerate(result.losses.items()):
        loss.plot(*_smooth(losses), color=f"C{index}", label=name.replace("_", " "))
    loss.set(title="Flamingo, by dataset", xlabel="step", ylabel="loss", yscale="log")
    loss.legend()

    numbers = result.config.shots
    for index, task in enumerate(TASKS):
        for is_shuffled in (False, True):
            shots.plot(
                range(len(numbers)),
                [100 * result.accuracies[task.name, each, is_shuffled] for each in numbers],
                color=f"C{index}",
                linestyle=":" if is_shuffled else "-",
                marker="o",
                label=task.name.replace("_", " ") + (", images shuffled" if is_shuffled else ""),
            )
    shots.set_xticks(range(len(numbers)), map(str, numbers))
    shots.set(title="held-out images", xlabel="shots", ylabel="exact match, %", ylim=(0, 103))
    shots.legend()

    for kind, steps in result.gates.items():
        for layer, values in enumerate(zip(*steps, strict=True)):
            gates.plot(
                range(1, 1 + len(values)),
                values,
                color=f"C{layer}",
                linestyle="-" if kind == "attention" else "--",
                label=f"layer {layer}, {kind}",
            )
    gates.axhline(0, color="black", lw=0.5)
    gates.set(title="gates", xlabel="step", ylabel="tanh(gate)")
    gates.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _smooth(losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """Steps, and the mean loss up to each since the one before."""
    ends = range(_SMOOTH, len(losses) + 1, _SMOOTH)
    return list(ends), [sum(losses[end - _SMOOTH : end]) / _SMOOTH for end in ends]


def _plot_captions(pyplot: Any, result: DemoResult, path: Path) -> None:
    shown = _some(result.captions)
    digits = load_digits(result.config.seed, result.config.test_images)
    rows = -(-len(shown) // _COLUMNS)
    figure, axes = pyplot.subplots(
        rows, _COLUMNS, figsize=(1.7 * _COLUMNS, 1.9 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, answer in zip(axes.flat, shown, strict=False):
        axis.imshow(digits.images[answer.index], cmap="gray_r")
        is_right = answer.is_right
        title = answer.said if is_right else f"{answer.said}\n({answer.expected})"
        axis.set_title(title, fontsize=7, color="black" if is_right else "red")
    figure.suptitle("Held-out images, captioned without examples; what is wrong is red", fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _some(answers: Sequence[Answer]) -> list[Answer]:
    """The first ones, and of wrong ones the first few in place of the last."""
    wrong = [each for each in answers if not each.is_right][: _COLUMNS // 2]
    right = [each for each in answers if each.is_right][: _CAPTIONED - len(wrong)]
    return right + wrong
