"""The demo from its first image to its last number."""

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from flamingo_fast.models.chinchilla import ChinchillaLM
from flamingo_fast.models.config import (
    ConditioningConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.flamingo import Flamingo
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.models.vision import VisionEncoder
from flamingo_fast.ops.dispatch import use_impl
from flamingo_fast.training.batch import Batch
from flamingo_fast.training.config import DatasetConfig, OptimizerConfig, TrainConfig
from flamingo_fast.training.demo.digits import load_digits
from flamingo_fast.training.demo.few_shot import Answer, accuracy, ask
from flamingo_fast.training.demo.language import (
    CAPTIONS,
    END,
    ITEM,
    OWN_NAMES,
    TASKS,
    Task,
    make_tokenizer,
)
from flamingo_fast.training.demo.pretraining import (
    pretrain_language_model,
    pretrain_vision_encoder,
)
from flamingo_fast.training.encoding import encode_features
from flamingo_fast.training.features import fingerprint
from flamingo_fast.training.samples import Medium, Sample
from flamingo_fast.training.step import TrainStep
from flamingo_fast.training.stream import make_stream
from flamingo_fast.training.writers import write_samples

MAX_IMAGES = 5
"""Of a training document (section 2.4 of the paper)."""
_IMAGE_TOKEN, _EOC_TOKEN = "<image>", "<EOC>"
_LM_DIM, _LM_DEPTH, _HEADS, _DIM_HEAD = 64, 2, 4, 16
_IMAGE_SIZE = 28
# Lambda. Before it has seen an example a model then says what captions say.
_WEIGHTS = {CAPTIONS.name: 1.0, OWN_NAMES.name: 0.4}
# Relative, of a loss: fp32 sums in another order, which updates make larger.
LOSS_TOLERANCE = 1e-4
_SHARDS, _FEATURES, _MODEL, _IMAGES = "shards", "features", "model", "images"
_RESULTS = "results.json"
FILES = ("training.png", "captions.png", _RESULTS, _SHARDS, _FEATURES, _MODEL, _IMAGES)
"""What a run leaves in its folder."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """How long the demo takes.

    Attributes:
        lm_steps: updates of the language model.
        vision_epochs: of the vision encoder, over the training images.
        documents: of each of the two datasets.
        rows: of each dataset in a step.
        steps: updates of what is between the two.
        test_images: that are held out.
        shots: examples in prompts.
        compared_steps: first ones that are made with impl="reference" too.
        seed: of everything.
    """

    lm_steps: int = 600
    vision_epochs: int = 40
    documents: int = 1500
    rows: int = 16
    steps: int = 250
    test_images: int = 360
    shots: tuple[int, ...] = (0, 1, 4, 32)
    compared_steps: int = 50
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that must hold, and whether it does."""

    claim: str
    found: str
    holds: bool


@dataclasses.dataclass
class DemoResult:
    """What was measured.

    Attributes:
        config: of the run.
        lm_losses: of each update of the language model.
        contrastive_accuracy: of held-out images, whose text is the one most like them.
        losses: of each step, of each dataset.
        reference_losses: of the first steps, with impl="reference".
        gates: of each step tanh of the gates, of attention and of feed-forward, of each layer.
        accuracies: by task, shots, and whether images were shuffled.
        captions: what was said of held-out images, with the fewest shots.
        hashes: of the frozen parts' weights, before and after.
        seconds: of each phase, on the clock; cpu_seconds: of all threads together.
    """

    config: DemoConfig
    lm_losses: list[float] = dataclasses.field(default_factory=list)
    contrastive_accuracy: float = 0.0
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    reference_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    gates: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    accuracies: dict[tuple[str, int, bool], float] = dataclasses.field(default_factory=dict)
    captions: list[Answer] = dataclasses.field(default_factory=list)
    hashes: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    cpu_seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def largest_difference(self) -> float:
        """Relative, between losses of the two implementations."""
        return max(
            (abs(a - b) / abs(b))
            for name, of_reference in self.reference_losses.items()
            for a, b in zip(self.losses[name], of_reference, strict=False)
        )

    def checks(self) -> list[Check]:
        """What the demo must show."""
        captions, shuffled = (
            [self.accuracies[CAPTIONS.name, shots, flag] for shots in self.config.shots]
            for flag in (False, True)
        )
        shots = ", ".join(map(str, self.config.shots))
        few, many = self.config.shots[0], self.config.shots[-1]
        gain = [self.accuracies[OWN_NAMES.name, each, False] for each in (few, many)]
        found = [
            Check(
                f"captions of held-out images: at least 90 % exact, at {shots} shots",
                f"{min(captions):.1%}",
                min(captions) >= 0.9,
            ),
            Check(
                "with shuffled images at most 20 %", f"{max(shuffled):.1%}", max(shuffled) <= 0.2
            ),
            Check(
                f"names that only examples tell: {many} shots are better than {few}",
                f"{gain[0]:.1%} to {gain[1]:.1%}",
                gain[1] > gain[0],
            ),
        ]
        for part, (before, after) in self.hashes.items():
            is_same = before == after
            found.append(
                Check(
                    f"the frozen {part} has the same bits after training",
                    f"{before[:12]} {'=' if is_same else '!='} {after[:12]}",
                    is_same,
                )
            )
        compared = self.config.compared_steps
        found.append(
            Check(
                f'losses of {compared} steps: impl="auto" as "reference", to {LOSS_TOLERANCE:g}',
                f"{self.largest_difference:.1e}",
                self.largest_difference <= LOSS_TOLERANCE,
            )
        )
        return found

    def to_json(self) -> str:
        """Everything but the answers."""
        accuracies = [
            {"task": task, "shots": shots, "shuffled": shuffled, "exact_match": value}
            for (task, shots, shuffled), value in self.accuracies.items()
        ]
        values = dataclasses.asdict(dataclasses.replace(self, accuracies={}, captions=[]))
        checks = [dataclasses.asdict(each) for each in self.checks()]
        return json.dumps({**values, "accuracies": accuracies, "checks": checks}, indent=1) + "\n"


def run_demo(
    out: str | Path, config: DemoConfig | None = None, *, console: Console | None = None
) -> DemoResult:
    """Everything but the pictures of it.

    Shards, features of the frozen encoder, the trained model with its tokenizer, some held-out
    images and results.json are in `out` then.

    Arguments:
        out: folder; of an earlier run's files there must be none, see `remove_run`.
        config: None: a demo of some minutes.
        console: where progress is shown; None: nowhere.

    Raises:
        ImportError: a library of flamingo_fast[demo] is not installed.
        FileExistsError: an earlier run's files are in `out`.
    """
    config = config or DemoConfig()
    out = Path(out)
    present = [name for name in FILES if (out / name).exists()]
    if present:
        raise FileExistsError(f"out: expected none of an earlier run, got {out / present[0]}")
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), _one_thread():
        return _Demo(out, config, console)()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Of PyTorch: sums then have one order on any number of cores, and threads of so small products
    wait for each other most of the time, for minutes where other programs run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def remove_run(out: str | Path) -> None:
    """Removes what an earlier run left in its folder, and nothing else."""
    for name in FILES:
        path = Path(out) / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def weights_hash(module: nn.Module) -> str:
    """Of all bits of its parameters and buffers, and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Demo:
    """One run."""

    def __init__(self, out: Path, config: DemoConfig, console: Console | None) -> None:
        self._out, self._config, self._console = out, config, console
        self._result = DemoResult(config)
        self._digits = load_digits(config.seed, config.test_images)
        self._tokenizer = make_tokenizer()
        self._model_config = _model_config(len(self._tokenizer))
        # It adds <EOC> and <image> after the vocabulary, where the config has them.
        self._processor = FlamingoProcessor.of(
            self._model_config,
            self._tokenizer,
            image_token=_IMAGE_TOKEN,
            eoc_token=_EOC_TOKEN,
        )
        transform = self._processor.image_transform
        self._pixels = torch.stack([transform(each.convert("RGB")) for each in self._digits.images])

    def __call__(self) -> DemoResult:
        config, result = self._config, self._result
        with self._phase("language model") as show:
            lang_model, result.lm_losses = pretrain_language_model(
                self._model_config.lm, self._tokenizer, config.lm_steps, config.seed, show
            )
        with self._phase("vision encoder") as show:
            encoder = self._pretrain_vision_encoder(show)
        parts: dict[str, nn.Module] = {"language model": lang_model, "vision encoder": encoder}
        before = {name: weights_hash(part) for name, part in parts.items()}
        with self._phase("shards and features") as show:
            train = self._write_data(encoder, show)
        with self._phase("Flamingo") as show:
            model = self._train(train, lang_model, encoder, show)
        result.hashes = {
            name: (before[name], weights_hash(part))
            for name, part in (
                ("language model", model.lang_model),
                ("vision encoder", model.vision_encoder),
            )
        }
        with self._phase("evaluation") as show:
            self._evaluate(model, show)
        self._save(model)
        return result

    def _pretrain_vision_encoder(self, show: Callable[[str], None]) -> VisionEncoder:
        digits, texts = self._digits, CAPTIONS.texts(random.Random())
        encoder, classify = pretrain_vision_encoder(
            self._model_config.vision,
            self._pixels[digits.train],
            [texts[digits.labels[index]] for index in digits.train],
            self._tokenizer,
            self._config.vision_epochs,
            self._config.seed,
            show,
        )
        names = sorted(texts)
        found = [names[kind] for kind in classify(self._pixels[digits.test]).tolist()]
        right = [
            name == texts[digits.labels[index]]
            for name, index in zip(found, digits.test, strict=True)
        ]
        self._result.contrastive_accuracy = sum(right) / len(right)
        show(f"{self._result.contrastive_accuracy:.1%} of held-out images by their nearest text")
        return encoder

    def _write_data(self, encoder: VisionEncoder, show: Callable[[str], None]) -> TrainConfig:
        config = self._config
        datasets = []
        for task in TASKS:
            folder = self._out / _SHARDS / task.name
            write_samples("interleaved", self._documents(task), folder, shard_samples=1000)
            datasets.append(
                DatasetConfig(
                    name=task.name,
                    kind="interleaved",
                    shards=(str(folder / "*.tar"),),
                    batch_size=config.rows,
                    weight=_WEIGHTS[task.name],
                    max_images=MAX_IMAGES,
                    features=str(self._out / _FEATURES),
                )
            )
            show(f"{config.documents} documents of {task.name}")
        vision = self._model_config.vision
        done = encode_features(datasets, vision, encoder, self._out / _FEATURES, batch_size=256)
        show(f"{done.samples} documents, features of {done.encoded} images")
        return TrainConfig(
            model=str(self._out / _MODEL),
            tokenizer=str(self._out / _MODEL),
            datasets=tuple(datasets),
            steps=config.steps,
            out=str(self._out),
            optimizer=OptimizerConfig(
                lr=4e-3, warmup_steps=50, weight_decay=0.01, beta2=0.98, max_grad_norm=1.0
            ),
            precision="fp32",
            seed=config.seed,
        )

    def _documents(self, task: Task) -> Iterator[Sample]:
        """Of own names many have a few digits only: examples help where a digit comes again."""
        digits = self._digits
        rng = random.Random(f"{self._config.seed}/documents/{task.name}")
        by_digit = [[i for i in digits.train if digits.labels[i] == digit] for digit in range(10)]
        for number in range(self._config.documents):
            texts = task.texts(rng)
            some = rng.sample(range(10), rng.choice((2, 10)) if task.has_own_names else 10)
            parts: list[str | Medium] = []
            for _ in range(rng.randint(1, MAX_IMAGES)):
                digit = rng.choice(some)
                png = digits.varied_png(rng.choice(by_digit[digit]), rng)
                parts += [Medium(f"{len(parts)}.png", png, is_video=False), texts[digit]]
            yield Sample(str(number), task.name, tuple(parts))

    def _train(
        self,
        train: TrainConfig,
        lang_model: ChinchillaLM,
        encoder: VisionEncoder,
        show: Callable[[str], None],
    ) -> Flamingo:
        config, result = self._config, self._result
        streams = {
            dataset.name: make_stream(
                dataset,
                train,
                self._model_config,
                self._tokenizer,
                encoder_fingerprint=fingerprint(encoder),
            )
            for dataset in train.datasets
        }
        first: list[dict[str, Batch]] = []
        model, step = self._make_step(train, lang_model, encoder)
        result.losses = {name: [] for name in streams}
        result.gates = {"attention": [], "feed-forward": []}
        for number in range(config.steps):
            batches = {name: next(stream) for name, stream in streams.items()}
            if number < config.compared_steps:
                first.append(batches)
            losses = step(batches).losses
            for name, loss in losses.items():
                result.losses[name].append(loss)
            self._record_gates(model)
            of_all = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            show(f"step {number + 1} of {config.steps}, loss of {of_all}")

        result.reference_losses = {name: [] for name in streams}
        # Beside the trained one: both have hooks on layers of a language model of their own.
        _, step = self._make_step(train, _copy_of(lang_model), encoder)
        with use_impl("reference"):
            for number, batches in enumerate(first):
                for name, loss in step(batches).losses.items():
                    result.reference_losses[name].append(loss)
                show(f'with impl="reference", step {number + 1} of {len(first)}')
        show(f"loss of {of_all}")
        return model.eval()

    def _make_step(
        self, train: TrainConfig, lang_model: ChinchillaLM, encoder: VisionEncoder
    ) -> tuple[Flamingo, TrainStep]:
        torch.manual_seed(self._config.seed)
        model = Flamingo(self._model_config, lang_model=lang_model, vision_encoder=encoder)
        self._init_tokens(model)
        step = TrainStep(
            model,
            train.optimizer,
            weights={each.name: each.weight for each in train.datasets},
            optimisation=self._model_config.optimisation,
            seed=train.seed,
        )
        return model, step

    @torch.no_grad()
    def _init_tokens(self, model: Flamingo) -> None:
        """`<EOC>` and `<image>` start as what stands in their places in text, and are learnt."""
        assert model.tokens is not None
        instead = {model.config.eoc_token_id: END, model.config.image_token_id: ITEM}
        words = [self._tokenizer.convert_tokens_to_ids(instead[each]) for each in model.tokens.ids]
        model.tokens.weight.copy_(model.lang_model.get_input_embeddings().weight[words])

    def _record_gates(self, model: Flamingo) -> None:
        blocks: Any = model.conditioning.blocks
        for kind, name in (("attention", "attn_gate"), ("feed-forward", "ff_gate")):
            gates = [getattr(block, name).detach().tanh().item() for block in blocks]
            self._result.gates[kind].append(gates)

    def _evaluate(self, model: Flamingo, show: Callable[[str], None]) -> None:
        for task in TASKS:
            for shots in self._config.shots:
                for is_shuffled in (False, True):
                    answers = ask(
                        model,
                        self._processor,
                        self._digits,
                        self._pixels,
                        task,
                        shots,
                        shuffle_images=is_shuffled,
                        seed=self._config.seed,
                    )
                    self._result.accuracies[task.name, shots, is_shuffled] = accuracy(answers)
                    if not (self._result.captions or is_shuffled):
                        self._result.captions = answers
                    show(f"{task.name}, {shots} shots, {accuracy(answers):.1%}")
        show(f"{len(self._digits.test)} held-out images")

    def _save(self, model: Flamingo) -> None:
        folder = self._out / _MODEL
        model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        images = self._out / _IMAGES
        images.mkdir()
        for digit in range(10):
            index = next(each for each in self._digits.test if self._digits.labels[each] == digit)
            (images / f"{digit}.png").write_bytes(self._digits.png(index))
        (self._out / _RESULTS).write_text(self._result.to_json())

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[Callable[[str], None]]:
        """Times it, and shows what it is at; then its last line stays."""
        started, cpu_started = time.perf_counter(), time.process_time()
        last = ""
        with contextlib.ExitStack() as stack:
            status = None if self._console is None else self._console.status(name)
            if status is not None:
                stack.enter_context(status)

            def show(line: str) -> None:
                nonlocal last
                last = line
                if status is not None:
                    status.update(f"{name}: {line}")

            yield show
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        self._result.seconds[name], self._result.cpu_seconds[name] = seconds, cpu_seconds
        if self._console is not None:
            took = f"{seconds:.0f} s, {cpu_seconds:.0f} s of the CPU"
            self._console.print(f"{name}: {last} ({took})", highlight=False)


def _model_config(vocab_size: int) -> FlamingoConfig:
    return FlamingoConfig(
        vision=VisionConfig(encoder="vit_mini", image_size=_IMAGE_SIZE),
        resampler=ResamplerConfig(
            dim=_LM_DIM, depth=1, heads=_HEADS, dim_head=_DIM_HEAD, num_latents=4
        ),
        conditioning=ConditioningConfig(heads=_HEADS, dim_head=_DIM_HEAD),
        lm=LanguageModelConfig(
            vocab_size=vocab_size, dim=_LM_DIM, depth=_LM_DEPTH, heads=_HEADS, dim_head=_DIM_HEAD
        ),
        eoc_token_id=vocab_size,
        image_token_id=vocab_size + 1,
        learnt_token_ids=(vocab_size, vocab_size + 1),
        datasets=(),
        # The image comes before its text.
        p_next=0.0,
    )


def _copy_of(lang_model: ChinchillaLM) -> ChinchillaLM:
    """Without the hooks of the model that has it."""
    copy = ChinchillaLM(lang_model.config)
    copy.load_state_dict(lang_model.state_dict())
    return copy.requires_grad_(False).eval()
