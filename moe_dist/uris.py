"""Locations that are named by a URI, such as `s3://bucket/results`, and how they may be shown."""

from __future__ import annotations

import re
from pathlib import Path

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


def is_uri(location: object) -> bool:
    """Say whether a location is a URI and not a path.

    Args:
        location: a text, or anything else, which is no URI.

    Returns:
        Whether it begins with a scheme, as `s3://` does.
    """
    return isinstance(location, str) and _SCHEME.match(location) is not None


def join_uri(uri: str, *names: str) -> str:
    """Name something below a URI.

    Args:
        uri: a directory's URI; a query (`?region=...`) stays at the end.
        *names: what to append, one part of the path or several.

    Returns:
        The longer URI.
    """
    location, mark, query = uri.partition("?")
    parts = [location.rstrip("/"), *(name.strip("/") for name in names if name)]
    return "/".join(parts) + mark + query


def below(location: Path | str, name: str) -> Path | str:
    """Name something below a location.

    Args:
        location: a path, or a URI as text.
        name: one part.

    Returns:
        A location of the same kind.
    """
    return join_uri(location, name) if isinstance(location, str) else location / name


def redact_uri(uri: str) -> str:
    """Strip user name, password, query and fragment from a URI.

    Args:
        uri: any URI, or a plain path, which is returned as it is.

    Returns:
        The URI, fit to be shown and stored.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    # The last @, because a password may hold an @ or a / that nobody escaped.
    return f"{scheme}://{re.split(r'[?#]', rest.rpartition('@')[2])[0]}"
