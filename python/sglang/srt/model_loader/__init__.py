"""Fills models with weights."""

from sglang.srt.model_loader.loader import load_model

__all__ = ["load_model"]
