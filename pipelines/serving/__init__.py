"""Serving a model from the command line."""
