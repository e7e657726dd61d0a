"""Data sets, their splits, tokenised batches and metrics."""
