"""`flamingo-fast generate`: what it prints, and what users' mistakes look like."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("safetensors")
PIL = pytest.importorskip("PIL.Image")
transformers = pytest.importorskip("transformers")

from tokenizer_cases import word_tokenizer  # noqa: E402

from flamingo_fast.models.config import ConfigError, FlamingoConfig  # noqa: E402
from flamingo_fast.models.flamingo import Flamingo  # noqa: E402
from flamingo_fast.models.folder import processor_of, prompt_parts  # noqa: E402
from flamingo_fast.models.generation import generate  # noqa: E402
from flamingo_fast.models.processor import Image  # noqa: E402
from flamingo_fast.models.saving import save_pretrained  # noqa: E402

WORDS = ["<pad>", "<s>", "<unk>", "<picture>", "<end>", *"a cat dog sees two of them".split()]
Run = Callable[..., tuple[int, str, str]]


def tiny_model():
    base = FlamingoConfig.preset("flamingo-mini")
    lm = dataclasses.replace(base.lm, vocab_size=len(WORDS), dim=32, depth=2)
    conditioning = dataclasses.replace(base.conditioning, dim_media=None)
    torch.manual_seed(0)
    model = Flamingo(dataclasses.replace(base, lm=lm, conditioning=conditioning)).eval()
    with torch.no_grad():
        for parameter in (*model.conditioning.parameters(), *model.lang_model.parameters()):
            if parameter.dim() != 1:
                parameter.normal_(std=0.3)
            elif len(parameter) == 1:
                parameter.fill_(1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(tiny_model(), folder)
    word_tokenizer(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / "red.png", folder / "blue.png"]
    for file, color in zip(files, ["red", "blue"], strict=True):
        PIL.new("RGB", (40, 30), color).save(file)
    return files


@pytest.fixture
def run(command: Run) -> Run:
    """Runs `flamingo-fast generate`; returns (exit code, stdout, stderr)."""
    return functools.partial(command, "generate")


def expected(folder, parts, **options):
    _, processor = processor_of(folder)
    batch = processor([parts])
    output = generate(
        tiny_model(),
        batch.input_ids,
        videos=batch.media,
        attention_mask=batch.attention_mask,
        **options,
    )
    return processor.decode(output.sequences[0]) + "\n"


@pytest.mark.parametrize("beams", [1, 3])
def test_prints_how_the_text_goes_on(run: Run, folder: Path, pictures: list[Path], beams) -> None:
    code, out, _ = run(
        *("--model", folder, "--prompt", "<picture> a cat <picture> sees", "--beams", beams),
        *("--image", pictures[0], "--image", pictures[1], "--max-new-tokens", 5),
        *("--device", "cpu"),
    )
    parts = [Image(pictures[0]), " a cat ", Image(pictures[1]), " sees"]
    assert (code, out) == (0, expected(folder, parts, max_new_tokens=5, num_beams=beams))
    assert out.strip()


def test_images_come_first_or_are_left_out(run: Run, folder: Path, pictures: list[Path]) -> None:
    arguments = ("--model", folder, "--prompt", " two of", "--max-new-tokens", 4)
    code, out, _ = run(*arguments, "--image", pictures[0])
    assert (code, out) == (0, expected(folder, [Image(pictures[0]), " two of"], max_new_tokens=4))
    code, out, _ = run(*arguments)
    assert (code, out) == (0, expected(folder, [" two of"], max_new_tokens=4))


def test_parts_of_a_prompt() -> None:
    assert prompt_parts("a <image> b<image>", ["x", "y"]) == ["a ", Image("x"), " b", Image("y")]
    assert prompt_parts("a", ["x", "y"]) == [Image("x"), Image("y"), "a"]
    assert prompt_parts("a", []) == ["a"]
    with pytest.raises(ValueError, match=r"prompt: expected <image> once .* 2 images.*1 times"):
        prompt_parts("a <image>", ["x", "y"])


def test_the_tokenizer_names_the_tokens(folder: Path) -> None:
    config, processor = processor_of(folder)
    assert (processor.image_token, processor.eoc_token) == ("<picture>", "<end>")
    assert processor.image_token_id == config.image_token_id


def test_a_tokenizer_that_lacks_the_tokens_gets_openflamingos(folder: Path, tmp_path: Path) -> None:
    config = FlamingoConfig.from_file(folder / "config.json")
    ids = len(WORDS), len(WORDS) + 1
    config = dataclasses.replace(
        config, image_token_id=ids[1], eoc_token_id=ids[0], learnt_token_ids=ids
    )
    (tmp_path / "config.json").write_text(config.to_json())
    word_tokenizer(WORDS).save_pretrained(tmp_path)
    _, processor = processor_of(tmp_path)
    assert (processor.image_token, processor.eoc_token) == ("<image>", "<|endofchunk|>")
    assert (processor.eoc_token_id, processor.image_token_id) == ids

    wrong = dataclasses.replace(config, image_token_id=ids[0], eoc_token_id=ids[1])
    (tmp_path / "config.json").write_text(wrong.to_json())
    with pytest.raises(ConfigError, match="image_token_id"):
        processor_of(tmp_path)


def _copy(folder: Path, to: Path, leave_out: str) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if not file.match(leave_out):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def _refused(run: Run, *arguments: object, because: str) -> None:
    code, out, err = run(*arguments)
    message = " ".join(err.replace("│", " ").split())
    # Long paths are broken anywhere.
    assert because.replace(" ", "") in message.replace(" ", ""), message
    assert "Traceback" not in err
    assert (code, out) == (2, "")


@pytest.mark.parametrize(
    "leave_out, because",
    [
        ("config.json", "expected the config of the model"),
        ("tokenizer*", "expected a tokenizer beside the model"),
        ("*.safetensors", "safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused(
    run: Run, folder: Path, tmp_path: Path, leave_out: str, because: str
) -> None:
    copy = _copy(folder, tmp_path / "copy", leave_out)
    _refused(run, "--model", copy, "--prompt", "a", because=because)


@pytest.mark.parametrize(
    "file, content, because",
    [
        ("config.json", b"{", "expected JSON"),
        ("config.json", b"\xff", "config.json"),
        ("tokenizer.json", b"{}", "its tokenizer can't be loaded"),
        ("model.safetensors", b"123", "model.safetensors"),
    ],
)
def test_a_broken_file_is_refused(
    run: Run, folder: Path, tmp_path: Path, file: str, content: bytes, because: str
) -> None:
    copy = _copy(folder, tmp_path / "copy", file)
    (copy / file).write_bytes(content)
    _refused(run, "--model", copy, "--prompt", "a", because=because)


def test_a_tokenizer_of_another_model_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    copy = _copy(folder, tmp_path / "copy", "tokenizer*")
    word_tokenizer([*WORDS, "bird"]).save_pretrained(copy)
    reason = f"expected a tokenizer of the model's {len(WORDS)} tokens, got token {len(WORDS)}"
    _refused(run, "--model", copy, "--prompt", "a bird", because=reason)


def test_wrong_arguments_are_refused(
    run: Run, folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    model = ("--model", folder)
    a = (*model, "--prompt", "a")
    _refused(run, "--model", tmp_path / "absent", "--prompt", "a", because="does not exist")
    _refused(run, *a, "--image", tmp_path / "absent.png", because="there is no file")
    _refused(run, *a, "--image", broken, because="can't be read")
    _refused(run, *model, "--prompt", "<picture> a", because="0 images")
    _refused(run, *model, "--prompt", "", because="at least a token")
    _refused(run, *a, "--max-new-tokens", 0, because="--max-new-tokens")
    _refused(run, *a, "--beams", 0, because="--beams")
    _refused(run, *a, "--device", "nothing", because="can't use nothing")
    if not torch.cuda.is_available():
        _refused(run, *a, "--device", "cuda", because="can't use cuda")
    _refused(run, *model, because="Missing option '--prompt'")
