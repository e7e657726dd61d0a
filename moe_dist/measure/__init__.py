"""What a model is worth and what it costs: evaluation, nearness, latency, parameters and FLOPs."""
