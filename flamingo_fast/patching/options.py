"""What `patch` is asked for."""

import dataclasses

FEATURES = ("cross_attention", "resampler", "gated_residual", "norm", "media_kv_cache")
UNATTENDED = (None, "zero", "zero_block")


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `patch`, which every patched module keeps.

    Attributes:
        cross_attention: attention of text over media, and the masks that models make for it.
        resampler: attention of latents over a medium's features.
        gated_residual: x + tanh(gate) * y in one operation.
        norm: RMS norms in one operation, and norms together with the residual before them.
        media_kv_cache: keys and values of media are kept while tokens are generated.
        unattended: what tokens get that attend to nothing; see `patch`.
    """

    cross_attention: bool = True
    resampler: bool = True
    gated_residual: bool = True
    norm: bool = True
    media_kv_cache: bool = True
    unattended: str | None = None

    def __post_init__(self) -> None:
        for name in FEATURES:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        if self.unattended not in UNATTENDED:
            expected = ", ".join(map(repr, UNATTENDED))
            raise ValueError(f"unattended: expected one of {expected}; got {self.unattended!r}")
