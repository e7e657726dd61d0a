"""All that knows Ray Train: where workers run, how they start, stop and begin again."""
