"""Places that are named by a URI, such as `s3://bucket/results`, and how they may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


def is_uri(place: object) -> bool:
    """Say whether a place is a URI and not a path.

    Args:
        place: a text, or anything else, which is no URI.

    Returns:
        Whether it begins with a scheme, as `s3://` does.
    """
    return isinstance(place, str) and _SCHEME.match(place) is not None


def join_uri(uri: str, *names: str) -> str:
    """Name something below a URI.

    Args:
        uri: a directory's URI; a query (`?region=...`) stays at the end.
        *names: what to append, one part of the path or several.

    Returns:
        The longer URI.
    """
    place, mark, query = uri.partition("?")
    parts = [place.rstrip("/"), *(name.strip("/") for name in names if name)]
    return "/".join(parts) + mark + query


def below(place: Path | str, name: str) -> Path | str:
    """Name something below a place.

    Args:
        place: a path, or a URI as text.
        name: one part.

    Returns:
        A place of the same kind.
    """
    return join_uri(place, name) if isinstance(place, str) else place / name


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
    if rest.startswith("/"):  # A path without a host: it has no user, and # is part of a name.
        return uri.partition("?")[0]
    # The last @, because a password may hold an @ or a / that nobody escaped.
    return f"{scheme}://{re.split(r'[?#]', rest.rpartition('@')[2])[0]}"


def sqlite_path(uri: str) -> str | None:
    """Find the file that a sqlite URI names.

    Args:
        uri: a database URI, as SQLAlchemy reads it.

    Returns:
        The file's path, relative or absolute; None for other databases.
    """
    found = _SQLITE.match(uri)
    return unquote(uri[found.end() :].partition("?")[0]) if found else None


def absolute_sqlite(uri: str) -> str:
    """Let a sqlite URI name the same file from any working directory.

    Args:
        uri: a database URI.

    Returns:
        The same with an absolute path; other URIs, and a database in memory, as they are.
    """
    path = sqlite_path(uri)
    if path is None or path in ("", ":memory:"):
        return uri
    _, mark, query = uri.partition("?")
    quoted = os.path.abspath(path).replace("%", "%25").replace("?", "%3F")
    return uri[: uri.index("///") + 3] + quoted + mark + query
