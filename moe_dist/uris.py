"""Locations that are named by a URI, such as `s3://bucket/results`, and how they may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


def is_uri(location: object) -> bool:
    """Say whether a location is a text that begins with a scheme, as `s3://` does."""
    return isinstance(location, str) and _SCHEME.match(location) is not None


def join_uri(uri: str, *names: str) -> str:
    """Name something below a URI; a query (`?region=...`) stays at the end."""
    location, mark, query = uri.partition("?")
    parts = [location.rstrip("/"), *(name.strip("/") for name in names if name)]
    return "/".join(parts) + mark + query


def below(location: Path | str, name: str) -> Path | str:
    """Name something below a path, or below a URI as text."""
    return join_uri(location, name) if isinstance(location, str) else location / name


def redact_uri(uri: str) -> str:
    """Strip user name, password, query and fragment from a URI; a path stays as it is."""
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    if rest.startswith("/"):  # A path without a host: it has no user, and # is part of a name.
        return uri.partition("?")[0]
    # The last @, because a password may hold an @ or a / that nobody escaped.
    return f"{scheme}://{re.split(r'[?#]', rest.rpartition('@')[2])[0]}"


def sqlite_path(uri: str) -> str | None:
    """Find the file, relative or absolute, of a sqlite URI; None for other databases."""
    found = _SQLITE.match(uri)
    return unquote(uri[found.end() :].partition("?")[0]) if found else None


def absolute_sqlite(uri: str) -> str:
    """Make the path of a sqlite URI absolute; other URIs, and `:memory:`, stay as they are."""
    path = sqlite_path(uri)
    if path is None or path in ("", ":memory:"):
        return uri
    _, mark, query = uri.partition("?")
    quoted = os.path.abspath(path).replace("%", "%25").replace("?", "%3F")
    return uri[: uri.index("///") + 3] + quoted + mark + query
