"""Shapes of a pass, as they are written on the command line."""

from __future__ import annotations


def parse_shape(text: str, command: str) -> tuple[int, int]:
    """Read sentences and tokens, such as 1x16; anything else is a ConfigError of the command."""
    from moe_dist.errors import ConfigError

    batch_size, _, seq_len = text.lower().replace("×", "x").partition("x")
    if not (batch_size.isdecimal() and seq_len.isdecimal()):
        raise ConfigError(
            [f"--shape {text!r} is not written as sentences x tokens, such as 1x16."],
            source=command,
        )
    return int(batch_size), int(seq_len)
