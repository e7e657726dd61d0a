"""The stages of the chain, each `run(config, inputs, tracker) -> StageResult`."""
