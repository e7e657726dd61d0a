"""Results in a bucket: files and directories below a URI, through pyarrow and fsspec.

A `Store` is one directory of it. Object stores know no rename, so a directory becomes visible by
its last file: `upload_tree` writes the manifest last and `delete_tree` takes it away first, and
readers ignore a directory without one.
"""

from moe_dist.storage.store import Entry, Store
from moe_dist.storage.trees import (
    MANIFEST,
    delete_tree,
    download_tree,
    local_copy,
    local_file,
    move_tree,
    receive_lines,
    upload_tree,
)

__all__ = [
    "MANIFEST",
    "Entry",
    "Store",
    "delete_tree",
    "download_tree",
    "local_copy",
    "local_file",
    "move_tree",
    "receive_lines",
    "upload_tree",
]
