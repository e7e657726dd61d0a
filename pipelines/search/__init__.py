"""The search over recipes: `moe-dist search`."""
