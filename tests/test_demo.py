"""The demo, shortened: what it learns, what stays frozen, what it writes, and when it says no."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("webdataset")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from flamingo_fast.cli.app import app  # noqa: E402
from flamingo_fast.models.folder import processor_of  # noqa: E402
from flamingo_fast.models.processor import Image  # noqa: E402
from flamingo_fast.models.saving import from_pretrained  # noqa: E402
from flamingo_fast.training.demo import digits, language, report, run  # noqa: E402
from flamingo_fast.training.demo.few_shot import Answer  # noqa: E402

SHORT = run.DemoConfig(
    lm_steps=80,
    vision_epochs=12,
    documents=200,
    rows=12,
    steps=170,
    test_images=50,
    shots=(0, 4),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(folder: Path) -> run.DemoResult:
    return run.run_demo(folder, SHORT)


@pytest.fixture
def demo(command: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs `flamingo-fast demo` as if it had this result; returns (exit code, stdout, stderr)."""

    def demo(result: run.DemoResult, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(run, "run_demo", lambda *_, **__: result)
        return command("demo", *arguments)

    return demo


@pytest.mark.slow
def test_captions_need_the_images(result: run.DemoResult) -> None:
    for shots in SHORT.shots:
        seen, shuffled = (
            result.accuracies[language.CAPTIONS.name, shots, flag] for flag in (False, True)
        )
        assert seen > shuffled + 0.3, f"{shots} shots"


@pytest.mark.slow
def test_frozen_parts_keep_their_bits_and_implementations_agree(result: run.DemoResult) -> None:
    for part, (before, after) in result.hashes.items():
        assert before == after, part
    assert {len(losses) for losses in result.reference_losses.values()} == {SHORT.compared_steps}
    assert result.largest_difference <= run.LOSS_TOLERANCE
    # Else the comparison would be one of the same code.
    assert any(
        result.losses[name][: SHORT.compared_steps] != losses
        for name, losses in result.reference_losses.items()
    )


@pytest.mark.slow
def test_gates_open_from_zero(result: run.DemoResult) -> None:
    for kind, steps in result.gates.items():
        assert len(steps) == SHORT.steps, kind
        assert all(abs(gate) < 0.05 for gate in steps[0]), kind
    assert max(abs(gate) for gate in result.gates["attention"][-1]) > 0.05


@pytest.mark.slow
def test_a_run_leaves_a_model_that_goes_on_and_a_file_of_numbers(
    result: run.DemoResult, folder: Path
) -> None:
    values = json.loads((folder / "results.json").read_text())
    assert {each["claim"]: each["holds"] for each in values["checks"]} == {
        each.claim: each.holds for each in result.checks()
    }
    config, processor = processor_of(folder / "model")
    model = from_pretrained(folder / "model", config=config)
    batch = processor([[Image(folder / "images" / "7.png")]])
    output = model.generate(batch.input_ids, videos=batch.media, max_new_tokens=5)
    index = next(each.index for each in result.captions if each.expected.endswith("seven"))
    said = next(each.said for each in result.captions if each.index == index)
    assert processor.decode(output.sequences[0]) == said


@pytest.mark.slow
def test_the_command_draws_and_judges(
    result: run.DemoResult, tmp_path: Path, demo: Callable
) -> None:
    good = dataclasses.replace(
        result,
        accuracies={
            (task.name, shots, is_shuffled): 0.1 if is_shuffled else 0.9 + shots / 100
            for task in language.TASKS
            for shots in SHORT.shots
            for is_shuffled in (False, True)
        },
    )
    code, out, _ = demo(good, "--out", tmp_path)
    assert code == 0
    assert "NO" not in out
    for name in ("training.png", "captions.png"):
        assert (tmp_path / name).stat().st_size > 10_000, name

    bad = dataclasses.replace(good, hashes={"language model": ("a", "b")})
    code, out, _ = demo(bad, "--out", tmp_path)
    assert code == 1
    assert "NO" in out


def test_an_earlier_run_is_refused_and_removed_when_asked(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "shards").mkdir()
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2
    # Its box folds lines.
    assert "--fresh" in " ".join(result.output.split())
    run.remove_run(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("captions", {"captions": 0.89}),
        ("shuffled", {"shuffled": 0.21}),
        ("names", {"many": 0.3}),
        ("frozen", {"after": "b"}),
        ("losses", {"loss": 1.01}),
    ],
)
def test_a_check_fails_alone(part: str, value: dict[str, float]) -> None:
    def checks(captions=0.9, shuffled=0.2, many=0.5, after="a", loss=1.0) -> list[run.Check]:
        accuracies = {("captions", shots, False): captions for shots in (0, 32)}
        accuracies |= {("captions", shots, True): shuffled for shots in (0, 32)}
        accuracies |= {("own_names", 0, False): 0.3, ("own_names", 32, False): many}
        return run.DemoResult(
            run.DemoConfig(shots=(0, 32)),
            losses={"captions": [1.0, 2.0]},
            reference_losses={"captions": [loss]},
            accuracies=accuracies,
            hashes={"language model": ("a", after)},
        ).checks()

    assert all(each.holds for each in checks())
    failed = [each.claim for each in checks(**value) if not each.holds]
    assert len(failed) == 1
    assert part in failed[0]


def test_digits_are_split_by_image() -> None:
    found = digits.load_digits(seed=3, test=100)
    assert len(found.test) == 100
    assert sorted(found.train + found.test) == list(range(1797))
    assert found.test != digits.load_digits(seed=4, test=100).test
    assert found.images[0].size == (8, 8)
    with pytest.raises(ValueError, match="test: expected"):
        digits.load_digits(seed=0, test=1797)


def test_names_are_of_a_document_and_captions_of_the_language() -> None:
    rng = random.Random(0)
    assert language.CAPTIONS.texts(rng) == language.CAPTIONS.texts(rng)
    several = {tuple(language.OWN_NAMES.texts(rng)) for _ in range(20)}
    assert len(several) == 20
    texts = next(iter(several))
    assert language.OWN_NAMES.answer(texts[7]) in language.NAMES[7]
    # Names of two digits must not be one word.
    assert len({name for names in language.NAMES for name in names}) == 30


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = language.make_tokenizer()
    rng = random.Random(1)
    for _ in range(50):
        text = language.corpus_document(rng, items=6)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_same_seed_makes_the_same_language_model() -> None:
    tokenizer = language.make_tokenizer()
    config = dataclasses.replace(run._model_config(len(tokenizer)).lm, depth=1)
    before = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        runs = [run.pretrain_language_model(config, tokenizer, 4, seed)[1] for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_captions_are_in_the_picture() -> None:
    answers = [Answer(index, "right" if index else "wrong", "right") for index in range(60)]
    shown = report._some(answers[1:] + answers[:1])
    assert len(shown) == 24
    assert answers[0] in shown
