"""What goes wrong in a store, in words that say what to do; never with a credential in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from moe_dist.errors import StorageError, is_full_disk
from moe_dist.uris import redact_uri

_CREDENTIALS = (
    "give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the node's role) to this "
    "process and to every node of the cluster"
)
# What the texts of pyarrow and fsspec say: first match wins.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (
        r"NO_SUCH_BUCKET|bucket does not exist",
        "there is no such bucket",
        "make the bucket, or correct the name; it may also lie at another endpoint",
    ),
    (
        r"INVALID_ACCESS_KEY|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN"
        r"|EXPIRED_TOKEN|HTTP status 401|credential",
        "the credentials are not accepted",
        _CREDENTIALS,
    ),
    (
        r"ACCESS_DENIED|HTTP status 403|Forbidden|PermissionDenied",
        "access is denied",
        f"grant list, read, write and delete below this URI; or {_CREDENTIALS}",
    ),
    (
        r"HTTP status 301|PermanentRedirect|AuthorizationHeaderMalformed"
        r"|the (?:configured )?region",
        "the bucket lies in another region",
        "set AWS_REGION (or `?region=` in the URI) to the bucket's region",
    ),
    (
        r"NETWORK_CONNECTION|curlCode|Cannot connect to host|Could not connect"
        r"|Could not resolve|timed? ?out",
        "the store cannot be reached",
        "check the network, and AWS_ENDPOINT_URL (or `?endpoint_override=` in the URI)",
    ),
    (r"FileNotFoundError", "there is no such file", "check the URI"),
)


@contextmanager
def storage_errors(uri: str, doing: str) -> Iterator[None]:
    """Turn what pyarrow and fsspec raise into a StorageError.

    Args:
        uri: shown without user info and query.
        doing: what was tried: `read`, `write`.

    Yields:
        Nothing. A full disk of this machine stays an OSError.

    Raises:
        StorageError: saying what is wrong and what to do.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, NotImplementedError) as error:
        if isinstance(error, OSError) and is_full_disk(error):
            raise
        raise explain(error, uri, doing) from None


def explain(error: Exception, uri: str, doing: str) -> StorageError:
    """Name an error of a store.

    Args:
        error: what pyarrow or fsspec raised.
        uri: shown without user info and query.
        doing: what was tried.

    Returns:
        The error for the user. Texts that are not known are quoted, since they help to search.
    """
    text = _without_secrets(str(error).strip() or repr(error), uri)
    where = f"cannot {doing} {redact_uri(uri)}"
    # fsspec hides why a server did not answer behind a FileNotFoundError.
    said = f"{text} {error.__cause__ or ''} {type(error).__name__}"
    for pattern, reason, remedy in _KINDS:
        if re.search(pattern, said, re.IGNORECASE):
            return StorageError(f"{where}: {reason}", remedy=remedy)
    return StorageError(
        f"{where}: {text.splitlines()[0]}",
        remedy="check the URI and the rights there, then try again",
    )


def _without_secrets(text: str, uri: str) -> str:
    text = text.replace(uri, redact_uri(uri))
    location, _, query = uri.partition("://")[2].partition("?")
    secrets = [*location.rpartition("@")[0].split(":"), query]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text
