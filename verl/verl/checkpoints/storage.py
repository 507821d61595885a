"""How torch.distributed.checkpoint writes and reads files here: with a sum of each, and running nothing in them.

Its own reader unpickles `.metadata`, and whatever in a checkpoint is no tensor, as the file says.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from verl.checkpoints.checksums import HashedFile, file_digest, write_checksums
from verl.checkpoints.plain_values import load_plain, nothing_but_tensors
from xbai.errors import UserError

METADATA_FILE = ".metadata"


class HashingWriter(dcp.FileSystemWriter):
    """Leaves the sums of all files of the folder beside them. They are made as the files are written."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, sync_files=True)
        self.fs = self._files = _HashedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See `StorageWriter`: what this rank has written, with its sums."""
        written = super().write_data(plan, planner).wait()
        hashed: Future[list[WriteResult]] = Future()
        hashed.set_result(
            [
                _HashedWrite(**vars(item), digest=self._files.digests[item.storage_data.relative_path])
                for item in written
            ]
        )
        return hashed

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See `StorageWriter`: runs on one rank, when all have written."""
        super().finish(metadata, results)
        # A rank's file comes at its rank's place: see `check_together`.
        written = (item for rank in results for item in rank if isinstance(item, _HashedWrite))
        digests = {item.storage_data.relative_path: item.digest for item in written}
        folder = Path(self.path)
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and name not in digests:
                digests[name] = self._files.digests.get(name) or file_digest(path)
        write_checksums(folder, digests)


@dataclass(frozen=True)
class _HashedWrite(WriteResult):
    digest: str


class _HashedFiles(FileSystem):
    """Attributes: digests: of the files written, by name."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with HashedFile(Path(path)) as stream:
            yield stream
        self.digests[Path(path).name] = stream.digest.hexdigest()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


def read_metadata(folder: Path) -> Metadata:
    """Names, shapes and places of what a folder holds; a `UserError` where `.metadata` is damaged, or no such thing."""
    return _PlainReader(folder).read_metadata()


def load_state(state: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    """Fill a state dict in place. A collective, unless `no_dist`.

    Raises:
        UserError: something that could run code; on every rank the same.
        CheckpointException: another failure.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=_PlainReader(folder), planner=_PlainPlanner(folder), no_dist=no_dist)
    except CheckpointException as error:
        failure = min(error.failures.items())[1][0]
        if isinstance(failure, UserError):
            raise failure from None
        if isinstance(failure, pickle.UnpicklingError):
            with nothing_but_tensors(folder):
                raise failure from None
        raise


class _PlainReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA_FILE
        try:
            with path.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            files = {info.relative_path for info in metadata.storage_data.values()}
            is_ours = isinstance(metadata, Metadata) and all(Path(name).name == name for name in files)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:
            # A pickle that is cut or garbled fails in any way.
            raise UserError(f"{path}: the file is damaged ({type(error).__name__})") from error
        if not is_ours:
            raise UserError(f"{path}: describes no checkpoint of this folder")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _PlainPlanner(DefaultLoadPlanner):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        *parents, last = self.mappings[name]
        target: Any = self.original_state_dict
        for key in parents:
            target = target[key]
        target[last] = load_plain(value, f"{self._folder}: {name}")


_CLASSES = {
    (allowed.__module__, allowed.__qualname__): allowed
    for allowed in (
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        dcp_metadata.BytesStorageMetadata,
        dcp_metadata.ChunkStorageMetadata,
        Metadata,
        dcp_metadata.MetadataIndex,
        StorageMeta,
        dcp_metadata.TensorProperties,
        dcp_metadata.TensorStorageMetadata,
        torch.Size,
        torch.serialization._get_layout,
    )
}
"""What a `.metadata` consists of: all of them only keep, or look up, what they are given."""
# The folder it was written in; Python 3.13 has moved the class.
_CLASSES |= {(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UserError(f"holds {module}.{name}, which could run code when read; not loaded")
