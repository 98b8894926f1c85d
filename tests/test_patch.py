"""patch, unpatch, the report, and what becomes of code that is no version that we know."""

import copy
import dataclasses
import json
from types import MethodType

import patch_cases
import pytest
import torch
from rich.console import Console
from torch import nn

import flamingo_fast
from flamingo_fast.patching import Rule, register, rules, unregister
from flamingo_fast.patching.sources import fingerprint
from flamingo_fast.patching.state import is_patched, own_forward


class Doubles(nn.Module):
    """A peer's module of one parameter."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.doubling = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return 2 * self.doubling * x


class Vendored(nn.Module):
    """The same code elsewhere, with comments and types."""

    def __init__(self) -> None:
        super().__init__()
        self.doubling = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        # A comment.
        return (
            2 * self.doubling * x
        )  # fmt: skip


class Edited(Doubles):
    def forward(self, x):
        return 3 * self.doubling * x


class AnotherDefault(nn.Module):
    """The same body; called without the argument, something else."""

    def __init__(self) -> None:
        super().__init__()
        self.doubling = nn.Parameter(torch.randn(4))

    def forward(self, x=1):
        return 2 * self.doubling * x


class Rewritten(Doubles):
    def forward(self, x):
        return self.doubling * x + self.doubling * x


class Inherits(Doubles):
    def extra(self) -> int:
        return 1


def fast(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * (self.doubling + self.doubling)


def _probes(module: nn.Module):
    yield (torch.randn(3, 4),), {}


RULE = Rule(
    name="test.doubles",
    features=("norm",),
    matches=lambda module: rules.has(module, tensors=("doubling",)),
    forward=fast,
    known={fingerprint([Doubles.forward]) or "": "test 1"},
    refuses=lambda module, options, will_patch: "wide" if module.doubling.numel() > 8 else None,
    notes=lambda module, options: ["it doubles"],
    probes=_probes,
)


@pytest.fixture(autouse=True)
def rule():
    register(RULE)
    yield
    unregister(RULE.name)


def test_patches_in_place_and_back() -> None:
    model = nn.Sequential(Doubles(), nn.Linear(4, 4), Doubles())
    parameters = {name: id(each) for name, each in model.named_parameters()}
    contents = {name: set(vars(each)) for name, each in model.named_modules()}
    report = flamingo_fast.patch(model)
    assert [entry.name for entry in report.patched] == ["0", "2"] and not report.left
    assert report.entries[0].source == "test 1" and type(model[0]) is Doubles
    assert (
        model[0].forward.args == (fast, model[0]) and model[1].forward.__func__ is nn.Linear.forward
    )
    assert {name: id(each) for name, each in model.named_parameters()} == parameters
    x = torch.randn(2, 4)
    assert torch.allclose(model[0](x), own_forward(model[0])(x))
    flamingo_fast.unpatch(model)
    assert {name: set(vars(each)) for name, each in model.named_modules()} == contents


def test_dry_run_changes_nothing() -> None:
    model = nn.Sequential(Doubles())
    report = flamingo_fast.patch(model, dry_run=True)
    assert report.patched and not is_patched(model[0])
    assert "would be patched" in str(report)


def test_dry_run_leaves_a_patched_model_patched() -> None:
    model = nn.Sequential(Doubles())
    flamingo_fast.patch(model)
    assert flamingo_fast.patch(model, dry_run=True).patched and is_patched(model[0])
    model = nn.Sequential(Rewritten())
    flamingo_fast.patch(model, unknown="probe")
    forward = model[0].forward
    report = flamingo_fast.patch(model, unknown="probe", dry_run=True)
    assert report.patched and is_patched(model[0]) and model[0].forward is forward


def test_patched_again_with_other_options() -> None:
    model = nn.Sequential(Doubles())
    flamingo_fast.patch(model)
    report = flamingo_fast.patch(model, norm=False)
    assert not is_patched(model[0]) and report.left[0].reason == "norm=False"


def test_context_manager_restores_after_an_error() -> None:
    model = nn.Sequential(Doubles())
    with pytest.raises(RuntimeError), flamingo_fast.patched(model) as report:
        assert report.patched and is_patched(model[0])
        raise RuntimeError
    assert not is_patched(model[0]) and "forward" not in vars(model[0])


def test_a_patched_model_is_patched_again_after_the_context() -> None:
    model = nn.Sequential(Doubles(), Doubles())
    flamingo_fast.patch(model, unattended="zero")
    before = [dict(vars(each)) for each in model]
    for options in ({}, {"norm": False}, {"dry_run": True}):
        with flamingo_fast.patched(model, **options):
            assert is_patched(model[0]) == (not options)
        assert [vars(each) for each in model] == before
    with pytest.raises(TypeError), flamingo_fast.patched(model, norm=1):
        pass
    with flamingo_fast.patched(model):
        theirs = model[0].forward = MethodType(_triples, model[0])
    assert model[0].forward is theirs and is_patched(model[1])


@pytest.mark.parametrize("cls", [Vendored, Inherits])
def test_same_code_elsewhere_is_known(cls: type) -> None:
    assert flamingo_fast.patch(nn.Sequential(cls())).patched


def test_other_code_is_left_alone_and_said() -> None:
    model = nn.Sequential(Edited(), Rewritten())
    report = flamingo_fast.patch(model)
    assert not report.patched and not is_patched(model[0])
    assert "none of those known (test 1)" in report.left[0].reason
    assert report.left[0].source.startswith("unknown (")


def test_another_signature_is_left_alone() -> None:
    module = AnotherDefault()
    assert "none of those known" in flamingo_fast.patch(module).left[0].reason
    assert torch.equal(module(), 2 * module.doubling)


def test_probe_tells_what_other_code_does() -> None:
    model = nn.Sequential(Edited(), Rewritten()).train()
    state = torch.get_rng_state()
    report = flamingo_fast.patch(model, unknown="probe")
    assert torch.equal(torch.get_rng_state(), state) and all(each.training for each in model)
    assert [entry.class_name for entry in report.patched] == ["Rewritten"]
    assert "probed: results differ by" in report.left[0].reason
    assert not is_patched(model[0]) and is_patched(model[1])


class Chooses(Doubles):
    def __init__(self, factor: int | None) -> None:
        super().__init__()
        self.factor = nn.Module()
        self.factor.value = factor

    def forward(self, x):
        return (self.factor.value or 2) * self.doubling * x


def test_probe_is_of_modules_with_the_same_settings() -> None:
    model = nn.Sequential(*map(Chooses, (2, 3, None)))
    flamingo_fast.patch(model, unknown="probe")
    assert [is_patched(each) for each in model] == [True, False, True]


def test_probe_on_meta_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Rewritten())
    assert "meta device" in flamingo_fast.patch(model, unknown="probe").left[0].reason


def _triples(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return 3 * self.doubling * x


def test_another_forward_on_the_instance_stays_and_is_said() -> None:
    model = nn.Sequential(Doubles(), Doubles())
    model[0].forward = MethodType(_triples, model[0])  # as Liger does
    theirs = model[0].forward
    report = flamingo_fast.patch(model)
    assert [entry.name for entry in report.patched] == ["1"]
    assert report.left[0].reason == "it has a forward of its own, test_patch._triples"
    flamingo_fast.unpatch(model)
    assert model[0].forward is theirs


def test_another_forward_that_comes_after_stays() -> None:
    model = nn.Sequential(Doubles())
    flamingo_fast.patch(model)
    theirs = model[0].forward = MethodType(_triples, model[0])
    assert not is_patched(model[0]) and not flamingo_fast.patch(model, dry_run=True).patched
    flamingo_fast.unpatch(model)
    assert model[0].forward is theirs
    del model[0].forward
    assert flamingo_fast.patch(model).patched and model[0].forward.args == (fast, model[0])


def test_a_forward_around_the_fast_one_keeps_working() -> None:
    model = nn.Sequential(Doubles())
    x = torch.randn(2, 4)
    before = model(x)
    flamingo_fast.patch(model)
    ours = model[0].forward
    model[0].forward = lambda *args: ours(*args) + 1
    flamingo_fast.unpatch(model)
    assert torch.equal(model(x), before + 1)


@pytest.mark.parametrize("hooks_first", [True, False])
def test_hooks_of_accelerate_are_around_the_fast_forward(hooks_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(Doubles(), Doubles())
    x = torch.randn(2, 4)
    before = model(x)
    if not hooks_first:
        flamingo_fast.patch(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model[0].doubling.is_meta
    if hooks_first:
        flamingo_fast.patch(model)
    assert is_patched(model[0]) and model[0]._old_forward.args[0] is fast
    assert torch.equal(model(x), before)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before) and twin[0]._old_forward.args[1] is twin[0]
    flamingo_fast.unpatch(model)
    assert not is_patched(model[0]) and torch.equal(model(x), before)
    flamingo_fast.patch(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert model[0].forward.args == (fast, model[0]) and is_patched(model[0])
    flamingo_fast.unpatch(model)
    assert "forward" not in vars(model[0])


def test_the_classes_own_forward_on_the_instance_is_none_of_another() -> None:
    module = Doubles()
    module.forward = module.forward
    model = nn.Sequential(module)
    flamingo_fast.patch(model)
    flamingo_fast.unpatch(model)
    assert "forward" not in vars(module)


def test_hooks_and_compile() -> None:
    model = nn.Sequential(Doubles(), Doubles())
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4)
    before = model(x)
    flamingo_fast.patch(model)
    torch.testing.assert_close(model(x), before)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), before)
    assert len(calls) == 3


class CallsOnly(torch.autograd.Function):
    """As the operations: without what torch.func and forward-mode AD need."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def fast_once(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return CallsOnly.apply(fast(self, x))


def test_transforms_get_the_modules_own_forward() -> None:
    register(dataclasses.replace(RULE, forward=fast_once), overwrite=True)
    module = Doubles()
    assert flamingo_fast.patch(module).patched
    x = torch.randn(4)
    for transform in (torch.func.grad, torch.func.jacfwd):
        transform(lambda x: module(x).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(4))
        tangent = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
    torch.testing.assert_close(tangent, 2 * module.doubling)
    assert "CallsOnly" in str(module(x).grad_fn)


def test_copies_are_patched_on_their_own() -> None:
    model = nn.Sequential(Doubles())
    flamingo_fast.patch(model)
    twin = copy.deepcopy(model)
    assert twin[0].forward.args == (fast, twin[0])
    flamingo_fast.unpatch(twin)
    assert is_patched(model[0]) and not is_patched(twin[0])


def test_saved_and_copied() -> None:
    x = torch.randn(2, 4)
    patch_cases.check_saved_and_copied(
        nn.Sequential(Doubles()), lambda model: (model(x), model(x).sum())
    )


def test_report_for_people_and_programs() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Doubles(), Doubles(), Doubles(16), Doubles()])})
    report = flamingo_fast.patch(model)
    found = json.loads(json.dumps(report.to_dict()))
    assert [entry["patched"] for entry in found["entries"]] == [True, True, False, True]
    assert found["entries"][2]["reason"] == "wide" and found["options"]["norm"] is True
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    text = console.export_text()
    for words in ("layers.{0-1,3} (3)", "layers.2", "left: wide", "note: it doubles", "3 modules"):
        assert words in text and words in str(report), words


def test_nothing_known() -> None:
    assert "nothing in it" in str(flamingo_fast.patch(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"norm": 1}, TypeError, "norm: expected True or False, got 1"),
        ({"unattended": "dense"}, ValueError, "unattended: expected one of"),
        ({"unknown": "try"}, ValueError, "unknown: expected one of"),
    ],
)
def test_wrong_arguments(options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        flamingo_fast.patch(nn.Linear(2, 2), **options)


def test_wrong_model() -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        flamingo_fast.patch({})
    with pytest.raises(TypeError, match="got dict"), flamingo_fast.patched({}):
        pass


def test_rules_have_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="there is a rule"):
        register(RULE)
    twice = dataclasses.replace(RULE, name="test.twice")
    with pytest.raises(ValueError, match="rules: there is a rule 'test.twice'"):
        register(twice, dataclasses.replace(twice, notes=lambda *_: None))
    with pytest.raises(KeyError):
        unregister(twice.name)
    register(RULE, overwrite=True)
