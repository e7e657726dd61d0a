"""Keeps credentials out of what is shown or written: this process's, and what looks like one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

HIDDEN = "***"
MIN_LENGTH = 8
"""Shorter values of variables are left alone: hiding `1` or `true` would hide half of a text."""

_WORD = r"(?:token|passw(?:or)?d|secret|credentials?|signature|sig|api_?key|access_?key(?:_?id)?)"
# User info up to the last @ before a space, since a password may hold one; a path has none.
_USER_INFO = re.compile(r"(?<=://)(?!/)[^\s\"'<>]+(?=@)")
_PARAMETER = re.compile(rf"([?&;][\w.-]*{_WORD}=)[^&#\s\"']+", re.IGNORECASE)
_KNOWN_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9]{16,}|gh[pousr]_\w{16,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_SECRET_VARIABLE = re.compile(rf"(?:^|_){_WORD}$", re.IGNORECASE)


def hide_secrets(text: str) -> str:
    """Put `***` in the place of the credentials in a text.

    Hidden are user names and passwords in URIs, parameters such as `?token=`, tokens of well-known
    forms, and the values of this process's own variables such as `HF_TOKEN` or
    `AWS_SECRET_ACCESS_KEY`.
    """
    for value in _secrets_of_environment():
        text = text.replace(value, HIDDEN)
    text = _USER_INFO.sub(HIDDEN, text)
    text = _PARAMETER.sub(rf"\1{HIDDEN}", text)
    return _KNOWN_FORM.sub(HIDDEN, text)


def _secrets_of_environment() -> Iterator[str]:
    # Another thread may change the environment meanwhile, as MLflow's does.
    for name in list(os.environ):
        value = os.environ.get(name, "")
        if _SECRET_VARIABLE.search(name) and len(value) >= MIN_LENGTH:
            yield value
