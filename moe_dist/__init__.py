"""Turn dense Transformers into distilled mixtures of experts."""

__version__ = "0.1.0"
