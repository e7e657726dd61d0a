"""One directory below a URI, and the few things that are done there."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.storage.faults import storage_errors
from moe_dist.uris import join_uri
from moe_dist.whole_files import whole_file

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_NUM_TRANSFERS = 8
_PROBE_SIZE = 16
# Object stores have names only; a directory there costs a request and means nothing.
_WITHOUT_DIRECTORIES = frozenset({"s3", "gcs", "abfs"})


@dataclass(frozen=True)
class Entry:
    """A file in a store.

    Attributes:
        name: its path below the store's URI, with `/`.
        size: in bytes.
    """

    name: str
    size: int


class Store:
    """A directory in a bucket, or wherever pyarrow and fsspec can go.

    Every method raises StorageError where the store fails.

    Args:
        uri: `s3://bucket/path`, `gs://...`, or another scheme of pyarrow or an installed fsspec
            driver. Credentials, region and endpoint come from the environment (`AWS_*`) or from
            the URI, as pyarrow has it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @cached_property
    def _opened(self) -> tuple[FileSystem, str]:
        with storage_errors(self.uri, "open"):
            return _open(self.uri)

    @property
    def filesystem(self) -> FileSystem:
        """The pyarrow file system, which Ray takes as its storage."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """The directory's path in the file system."""
        return self._opened[1]

    def at(self, *names: str) -> Store:
        """Return a directory below this one, on the same connection."""
        below = Store(join_uri(self.uri, *names))
        path = "/".join([self.root, *(name.strip("/") for name in names if name)])
        below.__dict__["_opened"] = (self.filesystem, path)
        return below

    def list(self, name: str = "") -> list[Entry]:
        """List all files at any depth below a directory.

        Args:
            name: the directory; the whole store by default.

        Returns:
            Its files in order of name; empty if there is no such directory.
        """
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._path(name), allow_not_found=True, recursive=True)
        with storage_errors(self.uri, "list"):
            found = self.filesystem.get_file_info(selector)
        start = len(self.root.rstrip("/")) + 1
        entries = [
            Entry(info.path[start:], int(info.size or 0))
            for info in found
            if info.type == FileType.File
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if there is no such file."""
        with storage_errors(join_uri(self.uri, name), "read"):
            try:
                with self.filesystem.open_input_stream(self._path(name)) as stream:
                    return bytes(stream.readall())
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; readers see the old content or the new one."""
        path = self._path(name)
        with storage_errors(join_uri(self.uri, name), "write"):
            self._make_parent(path)
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(content)

    def upload(self, pairs: Sequence[tuple[Path, str]]) -> None:
        """Upload files, several at a time.

        Args:
            pairs: each local file and its name here.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        local = LocalFileSystem()

        def send(pair: tuple[Path, str]) -> None:
            source, name = pair
            path = self._path(name)
            with storage_errors(join_uri(self.uri, name), "write"):
                self._make_parent(path)
                copy_files(
                    str(source),
                    path,
                    source_filesystem=local,
                    destination_filesystem=self.filesystem,
                )

        _in_parallel(send, pairs)

    def download(self, pairs: Sequence[tuple[str, Path]]) -> None:
        """Download files, several at a time; each appears whole.

        Args:
            pairs: each name here and the local file.
        """
        from pyarrow.fs import LocalFileSystem, copy_files

        local = LocalFileSystem()

        def fetch(pair: tuple[str, Path]) -> None:
            name, target = pair
            doing = storage_errors(join_uri(self.uri, name), "read")
            with whole_file(target) as beside, doing:
                copy_files(
                    self._path(name),
                    str(beside),
                    source_filesystem=self.filesystem,
                    destination_filesystem=local,
                )

        _in_parallel(fetch, pairs)

    def copy(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Copy files inside the store.

        Args:
            pairs: each old and new name.
        """

        def copy(pair: tuple[str, str]) -> None:
            source, target = map(self._path, pair)
            with storage_errors(join_uri(self.uri, pair[1]), "write"):
                self._make_parent(target)
                self.filesystem.copy_file(source, target)

        _in_parallel(copy, pairs)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; those that are gone already are no fault.

        Args:
            names: the files.
        """

        def remove(name: str) -> None:
            with storage_errors(join_uri(self.uri, name), "delete"):
                try:
                    self.filesystem.delete_file(self._path(name))
                except FileNotFoundError:
                    return

        _in_parallel(remove, list(names))

    def probe(self) -> None:
        """Write, read and delete a small file, to find every fault before anything depends on it.

        Raises:
            StorageError: if one of them fails.
        """
        name, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes[:_PROBE_SIZE]
        self.write(name, content)
        if self.read(name) != content:
            with storage_errors(self.uri, "read back what was written to"):
                raise OSError("the store returned something else")
        self.delete([name])

    def _make_parent(self, path: str) -> None:
        if self.filesystem.type_name not in _WITHOUT_DIRECTORIES:
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root


def _open(uri: str) -> tuple[FileSystem, str]:
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
    except ArrowInvalid as error:
        if "unrecognized filesystem" not in str(error).lower():
            raise
        import fsspec

        driver, path = fsspec.core.url_to_fs(uri)
        filesystem = PyFileSystem(FSSpecHandler(driver))
    return filesystem, path.rstrip("/")


def _in_parallel(work: Any, items: Sequence[Any]) -> None:
    if len(items) <= 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(min(_NUM_TRANSFERS, len(items)), thread_name_prefix="storage") as pool:
        # Iterating raises the first error; the others have run to their end by then.
        for _ in pool.map(work, items):
            pass
