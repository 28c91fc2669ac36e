"""Inference engines that take each candidate's weights in memory."""

from merging.evaluation.engines.settings import EngineSettings

__all__ = ["EngineSettings"]
