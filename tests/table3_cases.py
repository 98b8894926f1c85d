"""A scale of table 3 at which steps take next to no time: too small for numbers."""

import dataclasses

from flamingo_fast.bench.table3_scales import SCALES

MICRO = SCALES["micro"]
SMALLEST = dataclasses.replace(
    MICRO,
    name="smallest",
    encoders={name: ("vit_mini", 28) for name in MICRO.encoders},
    resampler=MICRO.resampler | {"dim": 16, "depth": 1},
    lm=MICRO.lm | {"vocab_size": 50, "dim": 24, "depth": 2, "heads": 2, "dim_head": 8},
    num_layers=1,
    tokens_divisor=8,
)
