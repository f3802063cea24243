"""Where the files of a dataset are: in a local folder, read in place, or on an object store, read through a cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.location import is_url
from data_pipeline.published_file import file_sha256
from data_pipeline.settings import UserError
from data_pipeline.shard_cache import ShardCache
from data_pipeline.shard_schema import ShardInfo

NUM_CONNECTIONS = 8  # files fetched at once
PAUSES_S = (0.5, 2.0)  # before the second and the third attempt
HEX_DIGITS = frozenset("0123456789abcdef")

Found = TypeVar("Found")


class ShardUnavailable(UserError):
    """A file of a dataset cannot be had from its store, or is not what dataset.json says."""


class LocalFiles:
    """A dataset's files in a folder."""

    is_remote = False

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes:
        """A small file's bytes.

        Raises:
            UserError: no such folder. FileNotFoundError: no such file in it.
        """
        if not os.path.isdir(self._folder):
            raise UserError(f"dataset {self._folder}: no such folder; expected the output of 'parallelotope shard'")
        return Path(self._folder, name).read_bytes()

    def indices(self, shards: Sequence[ShardInfo]) -> list[Path]:
        """The index of each shard."""
        return [Path(self._folder, shard.index_path) for shard in shards]

    def is_away(self) -> bool:
        """Whether the whole dataset cannot be read just now: an unmounted file system looks like lost files."""
        try:
            with open(os.path.join(self._folder, "dataset.json"), "rb") as stream:
                return not stream.read(1)
        except OSError:
            return True

    def open(self, shard: ShardInfo) -> int:
        """A descriptor of the shard's tar."""
        return os.open(os.path.join(self._folder, shard.path), os.O_RDONLY)

    def fetch(self, shards: Sequence[ShardInfo]) -> None:
        """Nothing: they are here."""


class RemoteFiles:
    """A dataset's files below an fsspec URL, local copies in a cache.

    Endpoints and credentials are fsspec's affair: its configuration files, FSSPEC_* and the variables of the store.
    """

    is_remote = True

    def __init__(self, url: str, cache: ShardCache) -> None:
        self._url = url.rstrip("/")
        self._cache = cache
        # A file system owns a thread and connections that do not survive a fork. Each process makes its own, and keeps
        # those of its parent alive: to clean them up in here would take the parent's sockets out of its event loop.
        self._systems: dict[int, tuple[Any, str]] = {}

    def read(self, name: str) -> bytes:
        """A small file's bytes.

        Raises:
            ShardUnavailable: the store does not answer or refuses. FileNotFoundError: no such file.
        """

        def attempt() -> bytes:
            system, root = self._system()
            found: bytes = system.cat_file(f"{root}/{name}")
            return found

        return self._retried(name, attempt)

    def names(self) -> set[str]:
        """All files below the URL, as paths relative to it; none where a part of one is `..`."""

        def attempt() -> set[str]:
            system, root = self._system()
            found = {str(path).removeprefix(root).lstrip("/") for path in system.find(root)}
            return {name for name in found if ".." not in name.split("/")}

        return self._retried("", attempt)

    def copy(self, name: str, path: Path) -> None:
        """Copy a file as it is to `path`.

        Raises:
            ShardUnavailable: the store does not answer or refuses. FileNotFoundError: no such file.
        """

        def attempt() -> None:
            system, root = self._system()
            system.get_file(f"{root}/{name}", str(path))

        self._retried(name, attempt)

    def indices(self, shards: Sequence[ShardInfo]) -> list[Path]:
        """A local copy of the index of each shard."""
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            return list(pool.map(self._index, shards))

    def is_away(self) -> bool:
        """Never of what is read from the cache; the store says itself when it cannot be reached."""
        return False

    def open(self, shard: ShardInfo) -> int:
        """A descriptor of the local copy of a shard's tar."""
        return self._cache.open_shard(_checked(shard.sha256), shard.num_bytes, lambda path: self._tar(shard, path))

    def fetch(self, shards: Sequence[ShardInfo]) -> None:
        """Have the tars of `shards` in the cache, several fetched at a time."""

        def one(shard: ShardInfo) -> None:
            self._cache.fetch_shard(_checked(shard.sha256), shard.num_bytes, lambda path: self._tar(shard, path))

        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            list(pool.map(one, shards))

    def _index(self, shard: ShardInfo) -> Path:
        def download(path: Path) -> None:
            self._download(shard.index_path, path, shard.index_bytes, shard.index_sha256)

        return self._cache.index(_checked(shard.index_sha256), shard.index_bytes, download)

    def _tar(self, shard: ShardInfo, path: Path) -> None:
        self._download(shard.path, path, shard.num_bytes, shard.sha256)

    def _download(self, name: str, path: Path, num_bytes: int, sha256: str) -> None:
        def attempt() -> None:
            system, root = self._system()
            system.get_file(f"{root}/{name}", str(path))
            found_bytes = path.stat().st_size
            if found_bytes != num_bytes:
                raise ValueError(f"{found_bytes} bytes found, {num_bytes} expected")
            if file_sha256(path) != sha256:
                raise ValueError("SHA-256 differs from dataset.json")

        try:
            self._retried(name, attempt)
        except FileNotFoundError as error:
            raise ShardUnavailable(f"{self._url}/{name}: no such object; dataset.json names it") from error

    def _retried(self, name: str, attempt: Callable[[], Found]) -> Found:
        """What `attempt` returns; a missing file at once, any other failure after the last attempt."""
        place = f"{self._url}/{name}"
        for pause_s in (*PAUSES_S, None):
            try:
                return attempt()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # each file system has exceptions of its own
                if pause_s is None or isinstance(error, PermissionError):
                    said = " ".join(str(error).split()) or type(error).__name__
                    raise ShardUnavailable(f"{place}: cannot be read: {said}") from error
            time.sleep(pause_s)
        raise AssertionError

    def _system(self) -> tuple[Any, str]:
        """The file system of this process, and the dataset's path in it."""
        process = os.getpid()
        if process not in self._systems:
            from fsspec.core import url_to_fs

            try:
                self._systems[process] = url_to_fs(self._url, skip_instance_cache=True)
            except ImportError as error:
                raise UserError(f"dataset {self._url}: {' '.join(str(error).split())}") from error
            except ValueError as error:
                raise UserError(f"dataset {self._url}: {error}; expected a folder or a URL of fsspec") from error
        return self._systems[process]


def open_files(location: Path | str, cache: ShardCache | None) -> LocalFiles | RemoteFiles:
    """The files of the dataset at a folder or URL; `cache`: for a URL, None: the user's own."""
    place = str(location)
    return RemoteFiles(place, cache or ShardCache.of()) if is_url(place) else LocalFiles(place)


def _checked(sha256: str) -> str:
    """A digest that is to become a file name."""
    if len(sha256) != 64 or not HEX_DIGITS.issuperset(sha256):
        raise ShardUnavailable(f"dataset.json: '{sha256}' is no SHA-256")
    return sha256
