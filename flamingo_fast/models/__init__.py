"""Whole models, on top of the modules. They need the extra `models`."""

from flamingo_fast.models.config import (
    ConditioningConfig,
    ConfigError,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
)
from flamingo_fast.models.flamingo import Flamingo, FlamingoOutput
from flamingo_fast.models.presets import table3_configs
from flamingo_fast.models.processor import FlamingoProcessor
from flamingo_fast.models.vision import VisionEncoder

__all__ = [
    "ConditioningConfig",
    "ConfigError",
    "Flamingo",
    "FlamingoConfig",
    "FlamingoOutput",
    "FlamingoProcessor",
    "LanguageModelConfig",
    "ResamplerConfig",
    "VisionConfig",
    "VisionEncoder",
    "table3_configs",
]
