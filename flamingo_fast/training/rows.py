"""From a sample to a document of tokens and media, and from documents to rows of a batch.

L tokens of a row, F frames of a medium, S features of a frame. "Section" and "appendix" are
Flamingo's (arXiv 2204.14198).
"""

import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch

from flamingo_fast.models.config import ConfigError, FlamingoConfig
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.training.bad_samples import BadSample
from flamingo_fast.training.batch import IGNORED, Batch
from flamingo_fast.training.config import DatasetConfig
from flamingo_fast.training.decoding import decode
from flamingo_fast.training.features import FeatureCache
from flamingo_fast.training.samples import Limits, Medium, Sample, parse
from flamingo_fast.training.shards import Record
from flamingo_fast.training.transforms import Augmentation, Transform


@dataclasses.dataclass(frozen=True)
class Draft:
    """A document whose media are not decoded yet.

    Attributes:
        ids: of its tokens.
        media: of its image tokens, in order.
        attend: see `Batch`; None: as the model says.
        position: in the dataset's order.
        key, shard: of the sample.
    """

    ids: list[int]
    media: list[Medium]
    attend: str | None
    position: int
    key: str
    shard: str


@dataclasses.dataclass(frozen=True)
class Document:
    """A document of a row.

    Attributes:
        ids: of its tokens.
        num_media: how many of them are image tokens.
        attend: see `Batch`; None: as the model says.
    """

    ids: list[int]
    num_media: int
    attend: str | None


@dataclasses.dataclass
class Rows:
    """Consecutive rows of a batch, as they travel between processes.

    Attributes:
        documents: of each row.
        media: frames of all media, one after another: (frames, 3, H, W) or features
            (frames, S, width); None: there are none.
        frames: of each medium.
    """

    documents: list[list[Document]]
    media: torch.Tensor | None
    frames: list[int]


class ChunkTokenizer:
    """Tokens of texts and of what stands between them.

    The ids are those that `FlamingoProcessor` makes of the same parts, without what the tokenizer
    puts behind a text. Names of special tokens within a text stay text: a caption with "<image>"
    in it gets no image.

    Arguments:
        processor: whose tokenizer it is, and whose image token.

    Attributes:
        prefix: what the tokenizer puts before a text, such as a BOS.
    """

    def __init__(self, processor: FlamingoProcessor) -> None:
        self._tokenizer = processor.tokenizer
        self._names = {processor.image_token_id: processor.image_token}
        if processor.eoc_token_id is not None and processor.eoc_token is not None:
            self._names[processor.eoc_token_id] = processor.eoc_token
        self._special = {*self._tokenizer.all_special_tokens, *self._names.values()}
        alone = self._tokenizer(processor.image_token)["input_ids"]
        place = alone.index(processor.image_token_id)
        self.prefix: list[int] = alone[:place]
        self._suffix = len(alone) - place - 1

    def __call__(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of texts, and of tokens given by their ids, after `prefix`."""
        texts = [part for part in parts if isinstance(part, str)]
        if not any(name in text for text in texts for name in self._special):
            # As one text, since a tokenizer may treat the first of several in another way.
            joined = "".join(part if isinstance(part, str) else self._names[part] for part in parts)
            # verbose: a page may be longer than what the language model takes; it is cut later.
            ids = self._tokenizer(joined, verbose=False)["input_ids"]
            ids = ids[: len(ids) - self._suffix]
            own = [part for part in parts if not isinstance(part, str)]
            if [each for each in ids if each in self._names] == own:
                return ids
        ids = [*self.prefix]
        for part in parts:
            if isinstance(part, str):
                made = self._tokenizer(
                    part, add_special_tokens=False, split_special_tokens=True, verbose=False
                )["input_ids"]
                # A vocabulary may have such a token for itself.
                ids += [each for each in made if each not in self._names]
            else:
                ids.append(part)
        return ids


class DocumentMaker:
    """Makes documents of a dataset's samples.

    What is random is a function of the seed, the dataset's name and the sample's position alone.

    Arguments:
        dataset: of whose samples.
        model: of the model.
        processor: its tokens, and how an image becomes pixels.
        seed: of the run.
        features: what the vision encoder made of the media, in place of pixels.

    Raises:
        ConfigError: max_tokens leaves no room for text.
    """

    def __init__(
        self,
        dataset: DatasetConfig,
        model: FlamingoConfig,
        processor: FlamingoProcessor,
        *,
        seed: int = 0,
        features: FeatureCache | None = None,
    ) -> None:
        self.dataset = dataset
        self.limits = Limits.of(dataset)
        self.pad_token_id = processor.pad_token_id
        self._image_id, self._eoc_id = processor.image_token_id, processor.eoc_token_id
        self._tokenize = ChunkTokenizer(processor)
        self._p_next = model.p_next
        self._attends_all = model.conditioning.attend == "all_previous"
        self._transform = Transform(processor.image_transform)
        self._features = features
        self._seed = f"{seed}/{dataset.name}"
        least = len(self._tokenize.prefix) + 3
        if dataset.max_tokens < least:
            raise ConfigError(
                f"datasets.max_tokens: expected at least {least}, what the tokenizer adds, an "
                f"image, a token of text and its end; got {dataset.max_tokens}"
            )

    def draft(self, record: Record, position: int) -> Draft:
        """Its tokens.

        Raises:
            BadSample: there is no text or a member of it is missing, and so on.
        """
        sample = parse(record, self.dataset.kind, self.limits)
        rng = random.Random(f"{self._seed}/{position}")
        if self.dataset.kind == "interleaved":
            ids, media, attend = self._page(sample, rng)
        else:
            ids, media, attend = self._pair(sample, rng)
        return Draft(ids, media, attend, position, sample.key, sample.shard)

    def finish(self, draft: Draft) -> tuple[Document, list[torch.Tensor], bool]:
        """Its media, decoded and transformed.

        Returns:
            The document; its media, (F, 3, H, W) fp32 each, or features (F, S, width); and whether
            some of them had to be converted.

        Raises:
            BadSample: a medium can't be used.
            FeatureError: there are no features of it.
        """
        media, is_unusual = [], False
        for index, medium in enumerate(draft.media):
            if self._features is not None:
                found = self._features.load(medium, self.limits, self.dataset.num_frames)
                media.append(found.features)
                is_unusual |= found.is_unusual
            else:
                decoded = decode(medium, self.limits, self.dataset.num_frames)
                augment = None
                if self.dataset.augment:
                    rng = random.Random(f"{self._seed}/{draft.position}/{index}")
                    augment = Augmentation.draw(rng)
                frames = [self._transform(each, augment) for each in decoded.frames]
                media.append(torch.stack(frames))
                is_unusual |= decoded.is_unusual
        return Document(draft.ids, len(media), draft.attend), media, is_unusual

    def _pair(
        self, sample: Sample, rng: random.Random
    ) -> tuple[list[int], list[Medium], str | None]:
        """`<image>` text `<EOC>`; a text that is too long is cut, and keeps its end."""
        parts: list[str | int] = []
        for part in sample.parts:
            if not isinstance(part, str):
                parts.append(self._image_id)
            else:
                has_space = rng.random() < self.dataset.space_probability
                parts.append(f" {part}" if has_space else part)
        end = [] if self._eoc_id is None else [self._eoc_id]
        ids = self._tokenize([*parts, *end])
        if len(ids) > self.dataset.max_tokens:
            ids = ids[: self.dataset.max_tokens - len(end)] + end
        # With the next medium it would see none.
        return ids, _media_of(sample), None if self._attends_all else "previous"

    def _page(
        self, sample: Sample, rng: random.Random
    ) -> tuple[list[int], list[Medium], str | None]:
        """Part of a page (section 2.4), as `_window` cuts it."""
        attend = "next" if rng.random() < self._p_next else "previous"
        end = [] if self._eoc_id is None else [self._eoc_id]
        parts: list[str | int] = []
        for part in sample.parts:
            if isinstance(part, str):
                parts.append(part)
            else:
                # Before every medium but a leading one.
                parts += [*(end if parts else ()), self._image_id]
        ids = self._tokenize([*parts, *end])
        prefix = self._tokenize.prefix
        body, room = ids[len(prefix) :], self.dataset.max_tokens - len(prefix)
        start = int(rng.random() * (max(len(body) - room, 0) + 1))
        body, kept = self._window(body, start, room)
        if not prefix + body:
            raise BadSample(
                "empty_text", f"expected text at token {start}, got images that are left out"
            )
        media = _media_of(sample)
        return (
            prefix + body,
            [media[index] for index in kept],
            None if self._attends_all else attend,
        )

    def _window(self, ids: list[int], start: int, room: int) -> tuple[list[int], list[int]]:
        """At most `room` of the tokens from `start` on, and which media are among them.

        Image tokens after the first max_images are left out, with the `<EOC>` before each, and the
        text after them moves up.
        """
        kept: list[int] = []
        media: list[int] = []
        medium = ids[:start].count(self._image_id)
        for token in itertools.islice(ids, start, None):
            if len(kept) == room:
                break
            if token == self._image_id:
                medium += 1
                if len(media) == self.dataset.max_images:
                    if kept and kept[-1] == self._eoc_id:
                        kept.pop()
                    continue
                media.append(medium - 1)
            kept.append(token)
        return kept, media


def _media_of(sample: Sample) -> list[Medium]:
    return [part for part in sample.parts if not isinstance(part, str)]


def gather(documents: list[list[Document]], media: list[torch.Tensor]) -> Rows:
    """Rows of documents and all their media, in order.

    Raises:
        ValueError: media of different sizes.
    """
    sizes = {each.shape[1:] for each in media}
    if len(sizes) > 1:
        raise ValueError(
            "media: expected frames of one size, got "
            + ", ".join(str(tuple(each)) for each in sorted(sizes))
        )
    frames = [len(each) for each in media]
    # One tensor, since each takes a file descriptor on its way to another process.
    return Rows(documents, torch.cat(media) if media else None, frames)


def collate(
    rows: Sequence[Rows],
    *,
    max_tokens: int,
    image_token_id: int,
    pad_token_id: int,
    pack: bool,
    has_features: bool,
) -> Batch:
    """A batch of rows.

    Arguments:
        rows: one after another.
        max_tokens: of a packed row, which is as long as that whatever it holds; others are as long
            as the longest of them.
        image_token_id: of image tokens, which are not predicted.
        pad_token_id: at padding.
        pack: whether a row may hold several documents; if not it holds one.
        has_features: whether media are features.
    """
    documents = [row for each in rows for row in each.documents]
    lengths = [sum(len(each.ids) for each in row) for row in documents]
    length = max_tokens if pack else max(lengths, default=0)
    # As lists first: a batch may have ten thousand documents, and a tensor of each takes time.
    ids: list[int] = []
    boundaries = [0]
    flat = []
    for i, row in enumerate(documents):
        for document in row:
            ids += document.ids
            boundaries.append(len(ids))
            flat.append(document)
        if lengths[i] < length:
            ids += [pad_token_id] * (length - lengths[i])
            if pack:
                boundaries.append(len(ids))
                flat.append(Document([], 0, None if row[0].attend is None else "previous"))
    input_ids = torch.tensor(ids, dtype=torch.int64).view(len(documents), length)
    is_text = torch.arange(length) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    labels = input_ids.masked_fill(~is_text | (input_ids == image_token_id), IGNORED)
    firsts = boundaries[:-1] if pack else range(0, len(ids), max(length, 1))
    labels.view(-1)[list(firsts)] = IGNORED
    attend = [each.attend for each in flat if each.attend is not None]
    pixels: torch.Tensor | list[torch.Tensor] | None = None
    # Empty, it still says that the vision encoder is not to run: on other ranks it doesn't.
    features: list[torch.Tensor] | None = [] if has_features else None
    frames = [count for each in rows for count in each.frames]
    if frames:
        parts = [each.media for each in rows if each.media is not None]
        media = parts[0] if len(parts) == 1 else torch.cat(parts)
        if has_features:
            features = list(media.split(frames))
        elif len(set(frames)) == 1:
            pixels = media.unflatten(0, (len(frames), frames[0]))
        else:
            pixels = list(media.split(frames))
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=None if pack else is_text.long(),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32) if pack else None,
        num_media=[each.num_media for each in flat],
        attend=attend or None,
        pixels=pixels,
        features=features,
    )
