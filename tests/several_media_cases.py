"""Layouts where a token attends to several media, for the tests of their contract and bounds."""

import dataclasses
import functools

import pytest
import torch
from attention_contract import inputs_of, locations_at, run_layout

import flamingo_fast as ff
from flamingo_fast.layout import MediaLayout

every_impl = pytest.mark.parametrize("impl", ["torch", "triton"])

FORWARD, COMBINE = "_several_media_fwd_kernel", "_combine_splits_kernel"
DQ, DKV = "_several_media_dq_kernel", "_several_media_dkv_kernel"


def all_previous_layout(images=((2, 5), (0, 1, 9)), num_media=(2, 3), seqlen=12, **options):
    return MediaLayout.from_media_locations(
        locations_at(images, seqlen), num_media, "all_previous", **options
    )


def make_mask() -> torch.Tensor:
    """(2, 9, 5) with holes; some tokens attend to nothing."""
    return torch.rand(2, 9, 5, generator=torch.Generator().manual_seed(3)) < 0.3


LENGTHS = torch.tensor([5, 8, 0, 3, 1, 8, 4, 0, 9, 2])


def holes_layout() -> MediaLayout:
    return MediaLayout.from_media_mask(make_mask(), media_seqlens=LENGTHS)


def split_layout() -> MediaLayout:
    """Of media of 300 tokens, which splits have three of."""
    return all_previous_layout(((0, 1, 2, 3),), (4,), seqlen=5)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A layout, and what else makes a difference to the kernels."""

    make_layout: functools.partial
    num_keys: int = 8
    unattended: str = "zero"

    def run(self, impl, layout=None, **options) -> dict[str, torch.Tensor]:
        return run_layout(
            self.make_layout() if layout is None else layout,
            impl,
            num_keys=self.num_keys,
            unattended=self.unattended,
            **options,
        )

    def inputs(self, **options) -> dict[str, torch.Tensor]:
        return inputs_of(self.make_layout(), num_keys=self.num_keys, **options)

    def call(self, impl, layout=None):
        """Of q, k and v."""
        return functools.partial(
            ff.masked_cross_attention,
            layout=self.make_layout() if layout is None else layout,
            unattended=self.unattended,
            impl=impl,
        )


SETTINGS = {
    "all_previous": Setting(all_previous_layout),
    "holes_dense": Setting(holes_layout, unattended="dense"),
    "split": Setting(split_layout, num_keys=300),
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
