"""Fills models with weights."""

from sglang.srt.model_loader.loader import fill_model, load_model, read_weights

__all__ = ["fill_model", "load_model", "read_weights"]
