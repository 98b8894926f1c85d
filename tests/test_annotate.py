"""Ranges that `annotate` names in models, ours and peers', and that nothing is there without it."""

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

for _name in ("timm", "transformers"):
    pytest.importorskip(_name)

from patch_models import FAMILIES  # noqa: E402
from table3_cases import SMALLEST  # noqa: E402

import flamingo_fast  # noqa: E402
from flamingo_fast import cli, ranges  # noqa: E402
from flamingo_fast.bench.table3_steps import Step  # noqa: E402
from flamingo_fast.models.presets import table3_configs  # noqa: E402
from flamingo_fast.profiling.parts import find_parts  # noqa: E402
from flamingo_fast.ranges import span  # noqa: E402

annotation = importlib.import_module("flamingo_fast.profiling.annotate")
annotate = annotation.annotate


class Domain:
    """In place of NVTX's: what is open, and every range with how deep it lies."""

    def __init__(self) -> None:
        self.depth, self.open = 0, set()
        self.names: list[str] = []
        self.lines: list[str] = []

    def get_event_attributes(self, message: str) -> str:
        return message

    def push_range(self, name: str) -> None:
        self.names.append(name)
        self.lines.append("  " * self.depth + name)
        self.depth += 1

    def pop_range(self) -> None:
        self.depth -= 1
        assert self.depth >= 0

    def start_range(self, name: str) -> object:
        self.names.append(name)
        started = object()
        self.open.add(started)
        return started

    def end_range(self, started: object) -> None:
        self.open.remove(started)


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Domain]:
    domain = Domain()
    monkeypatch.setattr(annotation, "nvtx_domain", lambda: domain)
    yield domain
    assert domain.depth == 0 and not domain.open and ranges._active is None


def _step(row: str = "baseline") -> Step:
    return Step(SMALLEST.config(table3_configs()[row]), SMALLEST, torch.device("cpu"))


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_ranges_of_a_training_step(domain: Domain) -> None:
    step = _step()
    hooks = _hooks(step.train_step.model)
    with annotate(step.train_step.model), span("step"):
        step()
    assert _hooks(step.train_step.model) == hooks
    batch, length = step.batches["m3w"].input_ids.shape
    text = f"({batch}, {length}, {step.train_step.model.config.lm.dim})"
    named = set(domain.names)
    numbered = ("lm layer 0", "lm layer 1", "gated block 0", "gated block 1")
    for name in (*numbered, "attention", "feed-forward"):
        assert {f"{name} {text}", f"{name} {text} backward"} <= named, (name, named)
    assert {"step", "backward", "optimiser", "loss"} <= {each.partition(" (")[0] for each in named}
    assert any(each.startswith("loss (") and each.endswith(" backward") for each in named)
    assert {f"dataset {each}" for each in step.batches} <= named
    for name in ("vision", "resampler", "layer 0"):
        assert any(each.startswith(f"{name} (") for each in named), name
    assert any(each.startswith("layer 0 (") and each.endswith(" backward") for each in named)
    assert domain.lines[0] == "step" and domain.lines[1].startswith("  dataset ")
    # A block's attention lies within it, and it within its layer, forward and backward.
    for backward in ("", " backward"):
        depths = [
            next(
                len(line) - len(line.lstrip())
                for line in domain.lines
                if line.lstrip().startswith(name + " (") and line.endswith(")" + backward)
            )
            for name in ("lm", "gated block 1", "attention")
        ]
        assert depths == sorted(set(depths)), (backward, depths)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peers_compute_the_same(family: str, patched: bool, domain: Domain) -> None:
    try:
        model = FAMILIES[family].make()
    except ImportError as error:
        pytest.skip(str(error))
    inputs = FAMILIES[family].inputs()
    if patched:
        flamingo_fast.patch(model)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(**inputs).logits
        with span("backward"):
            logits.float().square().mean().backward()
        return [logits, *(each.grad for each in model.parameters() if each.grad is not None)]

    expected, hooks = run(), _hooks(model)
    with annotate(model):
        found = run()
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert _hooks(model) == hooks
    names = {each.partition(" (")[0] for each in domain.names}
    wanted = {"model", "lm layer 0", "gated block 0", "gated block 1", "attention", "feed-forward"}
    wanted |= {"mllama": {"vision"}, "idefics": {"vision", "resampler"}}.get(family, {"resampler"})
    assert wanted <= names
    ended = {name for name in domain.names if name.endswith(" backward")}
    for name in wanted - {"vision", "model"}:
        assert any(each.startswith(name) for each in ended), (name, ended)
    parts = [name for name, _ in find_parts(model)]
    # A patched block names what is in it by itself: hooks would be in the way of its shortcuts.
    assert ("attention" in parts) is not patched


@pytest.mark.parametrize("row", ["grafting", "vanilla_xattn", "transformer"])
def test_rows_of_table_3_train_alike(row: str, domain: Domain) -> None:
    steps = [_step(row) for _ in range(2)]
    with annotate(steps[0].train_step.model):
        steps[0]()
    steps[1]()
    weights = (each.train_step.model.parameters() for each in steps)
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert any(each.startswith("layer 0 (") for each in domain.names)
    if row == "grafting":
        assert any(each.startswith("new layer 0 (") for each in domain.names)


def test_off_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call into nvtx, no hook and no node in the graph in a training step: counted."""
    calls: list[str] = []

    class Nvtx:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            raise AssertionError(name)

    monkeypatch.setitem(sys.modules, "nvtx", Nvtx())
    step = _step()
    # The model hooks its own layers, when it is made.
    registrations = (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
    )
    for name in registrations:
        monkeypatch.setattr(nn.Module, name, _counted(getattr(nn.Module, name), calls))
    monkeypatch.setattr(torch.Tensor, "register_hook", _counted(torch.Tensor.register_hook, calls))
    monkeypatch.setattr(ranges, "_mark", _counted(ranges._mark, calls))
    monkeypatch.setattr(ranges.Ranges, "begin", _counted(ranges.Ranges.begin, calls))
    step()
    assert calls == []
    # The same count is not 0 while it is on.
    monkeypatch.setattr(annotation, "nvtx_domain", Domain)
    with annotate(step.train_step.model):
        step()
    assert {"register_forward_hook", "begin", "_mark"} <= set(calls)


def _counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return counted


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
            if self.fails:
                raise RuntimeError("no")
        return x


def test_a_checkpointed_layer_runs_again_in_the_backward(domain: Domain) -> None:
    block = Block()
    with annotate(block):
        loss = block(torch.ones(2, 4, requires_grad=True)).sum()
        with span("backward"):
            loss.backward()
    assert [line.strip() for line in domain.lines].count("lm layer 0 (2, 4)") == 2
    assert "lm layer 0 (2, 4) backward" in domain.names


def test_what_raises_leaves_nothing_open(domain: Domain) -> None:
    block = Block()
    block.fails = True
    with annotate(block):
        for _ in range(2):
            with pytest.raises(RuntimeError), span("step"):
                block(torch.ones(2, 4))
            assert domain.depth == 0
        block.fails = False
        with span("step"):
            block(torch.ones(2, 4))
    of_a_step = ["step", "  model (2, 4)", "    lm layer 0 (2, 4)"]
    assert domain.lines == of_a_step * 3 + ["    lm layer 1 (2, 4)"]


def test_a_compiled_layer_is_one_part() -> None:
    block = Block()
    block.layers[0].compile(backend="eager")
    compiled = torch.compile(block, backend="eager")
    assert [name for name, _ in find_parts(block)] == ["model", "lm layer 0", "lm layer 1"]
    assert find_parts(compiled) == [("model", compiled)]


def test_what_begins_in_another_thread_may_end_in_any(domain: Domain) -> None:
    """As in the backward on a GPU."""
    told = annotation._Nvtx()
    told.push("step")
    for depth in (1, 0):
        # The second time nothing is open that was pushed.
        thread = threading.Thread(target=told.push, args=("lm backward",))
        thread.start()
        thread.join()
        assert domain.lines == ["step"] and len(domain.open) == 1
        told.pop()
        assert not domain.open and domain.depth == depth
        if depth == 1:
            told.pop()


class InPlace(nn.Module):
    """Changes what its layer was given and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Changes(), nn.Linear(3, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
            x += 1
        return x.relu_()


class Changes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(3).sin()


def test_operations_in_place_compute_the_same(domain: Domain) -> None:
    model = InPlace()
    found = []
    for is_on in (False, True):
        x = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
        with annotate(model) if is_on else contextlib.nullcontext():
            out = model(x)
            with span("backward"):
                out.square().sum().backward()
        found.append((out, x.grad))
    assert all(map(torch.equal, *found))
    # What a layer returned and somebody changed doesn't tell of its backward.
    assert domain.names[-2:] == ["backward", "model (2, 3) backward"]


def test_of_the_torch_profiler() -> None:
    block = Block()
    with torch.profiler.profile() as recorded, annotate(block, backend="torch"), span("step"):
        block(torch.ones(2, 4))
    names = [event.name for event in recorded.events()]
    for name in ("step", "model (2, 4)", "lm layer 1 (2, 4)"):
        assert names.count(f"flamingo_fast: {name}") == 1


def test_real_nvtx_takes_all_names() -> None:
    pytest.importorskip("nvtx")
    block = Block()
    with annotate(block), span("step"):
        block(torch.ones(2, 4)).sum().backward()


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend: expected one of nvtx, torch; got 'nsys'"):
        annotate(nn.Linear(2, 2), backend="nsys")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match=r"pip install 'flamingo_fast\[profile\]'"):
        annotate(nn.Linear(2, 2))


def test_a_run_with_nvtx(tmp_path: Path, domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "webdataset", "yaml"):
        pytest.importorskip(name)
    from run_cases import config, make_data, metrics, write_config

    make_data(tmp_path)
    for name in ("with", "without"):
        values = config(tmp_path, tmp_path / name, steps=2, checkpoint_every=0)
        path = write_config(tmp_path / f"{name}.yaml", values)
        argv = ["flamingo-fast", "train", str(path), *(["--nvtx"] if name == "with" else [])]
        monkeypatch.setattr(sys, "argv", argv)
        with contextlib.suppress(SystemExit):
            cli.main()
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    # Two steps of one run: the other's are not told.
    assert domain.names.count("step") == domain.names.count("data wait") == 2
    assert domain.names.count("dataset pairs") == 2
