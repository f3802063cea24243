"""A bounded folder of shards that were fetched from an object store, shared by all processes of a node.

A file's name is its content's SHA-256, so a shard that changed is another file, and datasets that share shards share
their copies. Each is fetched by one process while the others wait for its lock, which the kernel gives back when its
holder dies. What was used longest ago goes first; an open file is held by a shared lock and stays.

    FOLDER/shards/SHA256.tar            bounded
    FOLDER/indices/SHA256.parquet       small beside the shards, and needed at each start: not bounded
    FOLDER/locks/                       which process fetches what, which one makes room
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.published_file import publish
from data_pipeline.settings import UserError

GIB = 1 << 30
DEFAULT_CACHE_GIB = 50.0
PARTIAL = ".partial"

Download = Callable[[Path], None]  # writes a file's bytes under the path it is given, and checks them


def default_cache_folder() -> Path:
    """`parallelotope` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "parallelotope"


@dataclass(frozen=True, kw_only=True)
class ShardCache:
    """Local copies of at most `max_bytes` of shards below `folder`.

    The bound gives way only where open files alone exceed it.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def of(cls, folder: str | None = None, max_gib: float = DEFAULT_CACHE_GIB) -> ShardCache:
        """A cache below `folder`; None: in the user's cache folder."""
        place = default_cache_folder() if folder is None else Path(folder).expanduser()
        return cls(folder=place.absolute(), max_bytes=int(max_gib * GIB))

    def open_shard(self, sha256: str, num_bytes: int, download: Download) -> int:
        """A descriptor of the shard's tar, fetched where it is not here. Nobody removes the file while it is open.

        Raises:
            UserError: the cache folder cannot be used; and what `download` raises.
        """
        path = self.folder / "shards" / f"{sha256}.tar"
        while True:
            descriptor = _open_whole(path, num_bytes)
            if descriptor is not None:
                with suppress(PermissionError):  # another user's, in a cache that several share
                    os.utime(path)
                return descriptor
            self.fetch_shard(sha256, num_bytes, download)

    def fetch_shard(self, sha256: str, num_bytes: int, download: Download) -> None:
        """Make the shard's tar be here, by fetching it where no other process has."""
        self._fetch(self.folder / "shards" / f"{sha256}.tar", num_bytes, download)

    def index(self, sha256: str, num_bytes: int, download: Download) -> Path:
        """The local copy of an index."""
        path = self.folder / "indices" / f"{sha256}.parquet"
        self._fetch(path, num_bytes, download)
        return path

    def _fetch(self, path: Path, num_bytes: int, download: Download) -> None:
        if _is_whole(path, num_bytes):
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "locks").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cache folder {self.folder}: cannot be made: {error.strerror}") from error
        with self._lock(path.name[:2]):
            if _is_whole(path, num_bytes):
                return
            partial = path.with_name(f".{path.stem}.{num_bytes}{PARTIAL}")  # of the holder of the lock alone
            if path.parent.name == "shards":
                self._make_room(partial, num_bytes)
            try:
                download(partial)
                publish(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, partial: Path, num_bytes: int) -> None:
        """Remove what was used longest ago until `num_bytes` more fit, and book them by the name of `partial`."""
        with self._lock("room"):
            here: list[tuple[int, int, Path]] = []  # last use in ns, bytes, path
            total = num_bytes
            for entry in os.scandir(partial.parent):
                path = Path(entry.path)
                if path == partial:
                    continue
                if entry.name.endswith(PARTIAL):
                    total += 0 if self._is_leftover(path) else int(entry.name.split(".")[-2])
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    here.append((status.st_mtime_ns, status.st_size, path))
                    total += status.st_size
            for _, size, path in sorted(here):
                if total <= self.max_bytes:
                    break
                total -= size if _remove_unless_open(path) else 0
            partial.touch()

    def _is_leftover(self, partial: Path) -> bool:
        """Remove what a killed process left: nobody holds its lock."""
        try:
            with self._lock(partial.name[1:3], wait=False):
                partial.unlink(missing_ok=True)
                return True
        except BlockingIOError:
            return False

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """One of 257 file locks: names begin with two hexadecimal digits, and one is for making room."""
        descriptor = os.open(self.folder / "locks" / name, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(PermissionError):
            os.fchmod(descriptor, 0o666)  # whatever the umask: of all who share the cache
        try:
            _flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), self.folder)
            yield
        finally:
            os.close(descriptor)


def _flock(descriptor: int, kind: int, place: Path) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"cache folder {place}: its file system has no file locks ({error.strerror}); expected one on a local disk"
        ) from error


def _is_whole(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False


def _open_whole(path: Path, num_bytes: int) -> int | None:
    """A descriptor with a shared lock; None where the file is not here, was cut, or went between two steps."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        _flock(descriptor, fcntl.LOCK_SH, path.parent)
        status = os.fstat(descriptor)
        if status.st_nlink and status.st_size == num_bytes:
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _remove_unless_open(path: Path) -> bool:
    try:
        try:
            descriptor = os.open(path, os.O_RDWR)  # NFS gives exclusive locks to those only who may write
        except PermissionError:  # another user's; elsewhere reading is enough
            descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path.parent)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
