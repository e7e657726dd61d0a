"""Routers, experts and the layer that joins them, in plain torch."""
