"""The benchmark of patched models: what it measures, and that a wrong one gets no number."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from flamingo_fast.bench import patching, patching_models, timing
from flamingo_fast.bench.patching_models import PEERS, Case, Peer, Sizes
from flamingo_fast.cli import app
from flamingo_fast.patching import Rule, register, unregister
from flamingo_fast.patching.sources import fingerprint

TINY = Sizes(
    hidden=32,
    layers=4,
    heads=2,
    intermediate=48,
    vocab=64,
    vision=32,
    features=32,
    vision_layers=1,
    image=28,
    tile=28,
    large_tile=42,
    resampler=1,
    latents=4,
    shrink=64,
)
CPU = torch.device("cpu")


class Toy(nn.Module):
    """With a gate, and a layer that a rule is for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate.tanh() * self.layer(x)


def right(self: Toy, x: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(x, self.gate.tanh(), self.layer(x))


def wrong(self: Toy, x: torch.Tensor) -> torch.Tensor:
    return x + 1.1 * self.gate.tanh() * self.layer(x)


def wrong_gradient(self: Toy, x: torch.Tensor) -> torch.Tensor:
    return x + self.gate.detach().tanh() * self.layer(x) + self.gate - self.gate.detach()


def half_of_the_rows(self: Toy, x: torch.Tensor) -> torch.Tensor:
    out = right(self, x).clone()
    out[0, 0] = x[0, 0]
    return out


def raises(self: Toy, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no memory")


TOY = Peer(
    "toy",
    lambda sizes: nn.Sequential(Toy(), Toy()),
    lambda case, sizes, dtype: {
        "x": torch.randn(2, case.tokens, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    },
    lambda sizes: "8 wide",
    (Case("forward", "prefill", 2, 8, 1), Case("train", "train", 2, 8, 1, slow=True)),
    forward=lambda model, inputs: model(inputs["x"]),
    loss=lambda model, inputs: model(inputs["x"]).float().square().mean(),
)


@pytest.fixture
def rule() -> Iterator[Callable[..., None]]:
    """Registers a rule for Toy by its fast forward."""

    def make(forward: Callable[..., Any]) -> None:
        known = {fingerprint((Toy.forward,)): "1"}
        register(
            Rule("toy.toy", ("norm",), lambda module: type(module) is Toy, forward, known=known)
        )

    yield make
    unregister("toy.toy")


def run(dtype: str = "fp32", peer: Peer = TOY, **options: Any) -> patching.Results:
    return patching.run([(peer, peer.cases)], [dtype], CPU, quick=True, sizes=TINY, **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_measured(dtype: str, rule: Callable[..., None]) -> None:
    rule(right)
    results = run(dtype)
    assert not (results.failures or results.notes)
    assert [each.case.name for each in results.measured] == ["forward", "train"]
    for each in results.measured:
        assert each.modules == 2
        for before, after in (each.seconds, each.cpu_seconds):
            assert len(before) == len(after) >= 3
            assert min(before + after) >= 0
        assert min(*each.seconds[0], *each.seconds[1]) > 0
    assert [row[:4] for row in patching.table(results).rows] == [
        ["toy", "forward", "2x8, 1 images", dtype],
        ["toy", "train", "2x8, 1 images", dtype],
    ]
    rows = [row for each in results.measured for row in each.measurements()]
    assert {(row.kernel, row.provider, row.metric) for row in rows} == {
        ("patch_toy", "unpatched", "time"),
        ("patch_toy", "patched", "time"),
        ("patch_toy", "patched", "speedup"),
        ("patch_toy", "patched", "cpu_time_speedup"),
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("forward", "modes"),
    [
        (wrong, ["forward", "train"]),
        (wrong_gradient, ["train"]),
        (half_of_the_rows, ["forward", "train"]),
        (raises, ["forward", "train"]),
    ],
)
def test_what_is_wrong_has_no_number(
    forward: Callable[..., Any], modes: list[str], dtype: str, rule: Callable[..., None]
) -> None:
    rule(forward)
    results = run(dtype)
    failed = [failure.split()[0] for failure in results.failures]
    assert failed == [f"toy.{mode}" for mode in modes]
    assert not {f"toy.{each.case.name}" for each in results.measured} & set(failed)


def test_the_patched_model_has_the_weights_of_the_other() -> None:
    model = nn.Sequential(Toy(), nn.BatchNorm1d(3))
    other = patching._sharing_copy(model)
    for theirs, ours in zip(model.modules(), other.modules(), strict=True):
        assert theirs is not ours
    tensors = [*model.parameters(), *model.buffers()]
    for theirs, ours in zip(tensors, [*other.parameters(), *other.buffers()], strict=True):
        assert theirs is ours


def test_a_peer_that_raises_leaves_what_others_measured(rule: Callable[..., None]) -> None:
    rule(right)

    def no_memory(*_: object) -> Any:
        raise torch.OutOfMemoryError("2 GiB, of which 1 is free\nand more")

    peers = (
        TOY,
        dataclasses.replace(TOY, name="unbuilt", build=no_memory),
        dataclasses.replace(TOY, name="unfed", inputs=no_memory, cases=TOY.cases[:1]),
    )
    chosen = [(peer, peer.cases) for peer in peers]
    results = patching.run(chosen, ["fp32"], CPU, quick=True, sizes=TINY)
    assert [each.case.name for each in results.measured] == ["forward", "train"]
    assert results.failures == [
        "unbuilt fp32: OutOfMemoryError: 2 GiB, of which 1 is free",
        "unfed.forward fp32: OutOfMemoryError: 2 GiB, of which 1 is free",
    ]


def test_what_is_not_patched_is_said() -> None:
    results = run()
    assert not results.measured
    assert results.notes == ["toy fp32 was not measured: nothing in it was patched"]


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PEERS)
def test_every_case_runs(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build_or_skip(PEERS[name])
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    results = run(dtype, PEERS[name])
    assert not (results.failures or results.notes)
    assert [each.case.name for each in results.measured] == [
        case.name for case in PEERS[name].cases
    ]


def build_or_skip(peer: Peer) -> nn.Module:
    """Skips if it is not installed."""
    try:
        return patching_models.build(peer, TINY, torch.float32, CPU)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PEERS)
def test_gates_are_open(name: str) -> None:
    gates = [
        parameter
        for parameter_name, parameter in build_or_skip(PEERS[name]).named_parameters()
        if any(word in parameter_name for word in ("alpha_", "attn_gate", "ff_gate", "mlp_gate"))
    ]
    assert all(bool((gate.abs() > 0.1).all()) for gate in gates)
    assert gates or name == "idefics2_perceiver"


FILES = ["index.html", "report.md", "results.csv", "results.json"]


def bench(*args: str) -> Any:
    return CliRunner().invoke(app, ["bench", *args])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["patch", "--case", "nothing"], ["unknown family 'nothing'", "open_flamingo", "mllama"]),
        (["patch", "--case", "idefics.decode"], ["unknown family 'idefics.decode'"]),
        (["patch", "--dtype", "int8"], ["unknown dtype 'int8'"]),
        (["patch", "--out", __file__], ["is a file"]),
    ],
)
def test_a_wrong_option_is_named(args: list[str], expected: list[str]) -> None:
    result = bench(*args)
    assert result.exit_code == 2
    words = " ".join(result.output.replace("│", " ").split())
    for text in expected:
        assert text in words


@pytest.mark.parametrize(("forward", "code"), [(right, 0), (wrong, 1)])
def test_the_command(
    forward: Callable[..., Any],
    code: int,
    rule: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rule(forward)
    monkeypatch.setattr(patching_models, "PEERS", {"toy": TOY})
    args = ["patch", "--case", "toy", "--quick", "--dtype", "bf16", "--out", str(tmp_path)]
    result = bench(*args)
    assert result.exit_code == code, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    # The slow case only if it is asked for.
    assert ("FAILED: toy.forward" if code else "forward") in result.output
    assert "train" not in result.output.replace("(train)", "")
    if code == 0:
        assert "train" in bench(*args, "--case", "toy.train").output.replace("(train)", "")
