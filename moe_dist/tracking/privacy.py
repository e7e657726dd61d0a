"""What may leave this machine for a tracking server: no credentials, no machine paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from moe_dist.redaction import hide_secrets
from moe_dist.uris import redact_uri

HIDDEN = "(hidden)"
# A whole word of a key: `max_tokens` and `tokenizer` are no secrets, `hub_token` is one.
_SECRET_KEY = re.compile(
    r"(?:^|[._\-])(?:token|password|passwd|secret|credentials?|api_?key|access_?key)$",
    re.IGNORECASE,
)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://[^\s\"']+")
_ABSOLUTE_PATH = re.compile(r"^(?:/|~|[A-Za-z]:[\\/])")


def scrub(value: object, key: str = "") -> object:
    """Copy plain data without its secrets and machine paths, to be sent or stored.

    Values under keys such as `hub_token` or `password` are hidden, user info is taken out of URIs,
    and of an absolute path the last part is kept. `key` is the name that the value stands under.
    """
    if isinstance(value, Mapping):
        return {str(name): scrub(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [scrub(inner, key) for inner in value]
    if value is not None and not isinstance(value, bool) and _SECRET_KEY.search(key):
        return HIDDEN
    if isinstance(value, PurePath):
        value = str(value)
    return _scrub_text(value) if isinstance(value, str) else value


def flatten(config: Mapping[str, object]) -> dict[str, str]:
    """Turn a nested configuration into MLflow parameters with dotted names, scrubbed.

    Args:
        config: plain data, such as pydantic's `model_dump(mode="json")`.

    Returns:
        One text for each leaf; lists of plain values stay together, empty mappings count as a leaf.
    """
    flat: dict[str, str] = {}

    def visit(prefix: str, value: object) -> None:
        if isinstance(value, Mapping) and (value or not prefix):
            for name, inner in value.items():
                visit(f"{prefix}.{name}", inner)
        else:
            flat[prefix] = str(scrub(value, prefix))

    for name, value in config.items():
        visit(str(name), value)
    return flat


def _scrub_text(text: str) -> str:
    if _ABSOLUTE_PATH.match(text):
        return hide_secrets(PurePath(text.replace("\\", "/")).name)
    return hide_secrets(_URI.sub(lambda found: _scrub_uri(found[0]), text))


def _scrub_uri(uri: str) -> str:
    shown = redact_uri(uri)
    scheme, _, rest = shown.partition("://")
    # file:///home/me/x and sqlite:////home/me/x carry a machine path; a host has none in front.
    return f"{scheme}:///{PurePath(rest).name}" if rest.startswith("/") else shown
