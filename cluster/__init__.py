"""Reaching a cluster; for now only `ray_config.yaml` at the top of the repository."""
