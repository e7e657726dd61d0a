"""The commands of `moe-dist`, and what people and programs see while they run."""
