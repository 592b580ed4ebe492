"""The three components as tensor-only modules that share diffusers' weights."""

from export.modules.load import build_components, load_components

__all__ = ["build_components", "load_components"]
