"""Samples that can't be used: why not, how many, and when they are too many.

A bad sample is counted, reported and skipped: never fatal, never silent.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

REASONS: tuple[str, ...] = (
    "missing_member",
    "duplicate_member",
    "invalid_json",
    "wrong_json_shape",
    "image_index_out_of_range",
    "empty_text",
    "text_too_long",
    "text_not_utf8",
    "empty_file",
    "not_an_image",
    "truncated_image",
    "broken_image",
    "decompression_bomb",
    "unusual_image",
    "broken_video",
    "broken_shard",
)
# Outcomes of samples that are used.
OK = "ok"
CONVERTED = "converted_image"

# A rate of fewer samples says little.
_SAMPLES_OF_RATE = 100
_EXAMPLES = 3
_DETAIL_CHARS = 200


class BadSample(ValueError):
    """A sample that can't be used.

    Attributes:
        reason: one of `REASONS`:
            missing_member: no text, image or video, or not one that the JSON names;
            duplicate_member: two of a name, or two images or videos where one is expected;
            invalid_json, wrong_json_shape: no JSON, or not what the kind has;
            image_index_out_of_range: an image belongs to a text that there is not;
            empty_text: none but white space, or nothing beside images that are left out;
            text_too_long: more than `max_text_chars`;
            text_not_utf8: also JSON with half of a surrogate pair, which no UTF-8 can hold;
            empty_file: a medium of zero bytes;
            not_an_image: no format that is read (JPEG, PNG, WebP, GIF, BMP, TIFF);
            truncated_image: its data ends early; broken_image: it can't be decoded otherwise;
            decompression_bomb: an image or video of more than `max_image_pixels`, or an image with
            a side of more than 65,535;
            unusual_image: CMYK, 16-bit or animated, where the config says "skip"; or of floating
            point, which nothing says how to convert;
            broken_video: no frames can be decoded;
            broken_shard: the tar file can't be read here, or ends within the sample.
        detail: what it was and what was expected, one line.
    """

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"reason: expected one of {', '.join(REASONS)}; got {reason!r}")
        # Messages of decoders may have lines and parts of the data in them.
        self.reason, self.detail = reason, _printable(" ".join(detail.split())[:_DETAIL_CHARS])
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class BadSamplesError(RuntimeError):
    """More samples are bad than may be; the message lists the reasons and examples of each."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A sample of an outcome: its key, the shard it is in, and what was found."""

    key: str
    shard: str
    detail: str


class Outcomes:
    """What became of samples.

    Attributes:
        counts: of each outcome: "ok"; "converted_image", a sample that is used and has an unusual
            image that was converted; and the `REASONS` of those that are not used. They add up to
            the samples that were looked at.
        examples: the first few of each outcome but "ok".
        broken_shards: what is wrong with tar files that can't be read in full, by path; their
            lost samples can't be counted.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[Example]] = {}
        self.broken_shards: dict[str, str] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcomes) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"Outcomes({dict(self.counts)})"

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def bad(self) -> int:
        return sum(self.counts[reason] for reason in REASONS)

    def add_used(self, key: str, shard: str, *, is_converted: bool = False) -> None:
        """A sample that is used; `is_converted`: with an unusual image among its media."""
        if is_converted:
            self._add(CONVERTED, key, shard, "converted to RGB of 8 bits")
        else:
            self.counts[OK] += 1

    def add_bad(self, key: str, shard: str, error: BadSample) -> None:
        """A sample that is skipped."""
        self._add(error.reason, key, shard, error.detail)

    def _add(self, outcome: str, key: str, shard: str, detail: str) -> None:
        self.counts[outcome] += 1
        examples = self.examples.setdefault(outcome, [])
        if len(examples) < _EXAMPLES:
            examples.append(Example(_printable(key), _printable(shard), detail))

    def merge(self, other: "Outcomes") -> None:
        """Adds those of `other`; its examples come after those that are here."""
        self.counts.update(other.counts)
        for outcome, examples in other.examples.items():
            mine = self.examples.setdefault(outcome, [])
            mine += examples[: _EXAMPLES - len(mine)]
        self.broken_shards.update(other.broken_shards)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        examples = {
            outcome: [dataclasses.asdict(example) for example in each]
            for outcome, each in self.examples.items()
        }
        counts = {outcome: count for outcome, count in self.counts.items() if count}
        return {"counts": counts, "examples": examples, "broken_shards": dict(self.broken_shards)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Outcomes":
        """Of what `to_dict` returned."""
        found = cls()
        found.counts.update(values["counts"])
        for outcome, examples in values["examples"].items():
            found.examples[outcome] = [Example(**each) for each in examples]
        found.broken_shards.update(values["broken_shards"])
        return found

    def describe(self) -> str:
        """Lines: bad and converted samples by outcome with examples, then broken shards."""
        lines = []
        for outcome, count in self.counts.most_common():
            if outcome == OK:
                continue
            lines.append(f"{outcome}: {count}")
            lines += [
                f"  {each.shard}, {each.key}: {each.detail}"
                for each in self.examples.get(outcome, ())
            ]
        lines += [f"broken shard {path}: {what}" for path, what in self.broken_shards.items()]
        return "\n".join(lines)

    def check(
        self, max_bad_rate: float, *, name: str = "", min_samples: int = _SAMPLES_OF_RATE
    ) -> None:
        """Stops what reads them where too many are bad.

        Arguments:
            max_bad_rate: from 0 to 1, of all that were looked at.
            name: of the dataset, for the message.
            min_samples: fewer are not judged.

        Raises:
            BadSamplesError: with the list of reasons and examples.
        """
        if self.total < min_samples or self.bad <= max_bad_rate * self.total:
            return
        where = f"{name}: " if name else ""
        raise BadSamplesError(
            f"{where}{self.bad} of {self.total} samples are bad ({self.bad / self.total:.1%}), "
            f"more than max_bad_rate, {max_bad_rate:.1%}\n{self.describe()}"
        )


def _printable(text: str) -> str:
    """Names of files may hold bytes that no terminal takes."""
    return text.encode(errors="replace").decode()
