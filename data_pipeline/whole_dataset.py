"""Every file of a dataset at hand: where it lies, or copied one tar at a time from an object store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.location import is_url
from data_pipeline.settings import UserError
from data_pipeline.shard_cache import ShardCache
from data_pipeline.shard_store import RemoteFiles


class WholeDataset:
    """A folder with all files of a dataset but its tars, and a way to each of those.

    Attributes:
        folder: on this machine.
        tar_names: of all tars that are there, in a shard list or not.
    """

    def __init__(self, folder: Path, tar_names: set[str], store: RemoteFiles | None) -> None:
        self.folder = folder
        self.tar_names = tar_names
        self._store = store

    @contextmanager
    def tar(self, name: str) -> Iterator[Path]:
        """The path of a tar, as it is; a copy is removed afterwards.

        Raises:
            FileNotFoundError: a store has no such object.
        """
        path = self.folder / name
        if self._store is None:
            yield path
            return
        try:
            self._store.copy(name, path)
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def whole_dataset(location: Path | str) -> Iterator[WholeDataset]:
    """Open the dataset in a folder or below a URL.

    Raises:
        UserError: nothing there, or a store that does not answer.
    """
    if not is_url(str(location)):
        folder = Path(location)
        yield WholeDataset(folder, {path.name for path in folder.glob("shard-*.tar")}, None)
        return
    store = RemoteFiles(str(location), ShardCache.of())
    names = store.names()
    if not names:
        raise UserError(f"dataset {location}: nothing there; expected the output of 'parallelotope shard'")
    tars = {name for name in names if name.endswith(".tar")}
    with tempfile.TemporaryDirectory(prefix="parallelotope-") as folder_name:
        folder = Path(folder_name)
        for name in sorted(names - tars):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            store.copy(name, target)
        yield WholeDataset(folder, tars, store)
