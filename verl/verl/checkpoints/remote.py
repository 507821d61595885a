"""Copies of a run's checkpoints in a second folder, most often a remote one (`trainer.default_hdfs_dir`), by fsspec.

URL/
  global_step_N/...                        as in the local folder
  global_step_N/complete.json              written last: a checkpoint without it is not whole
  latest_checkpointed_iteration.txt        written after that
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.core import split_protocol, url_to_fs

from verl.checkpoints.checksums import check_checkpoint, check_inside
from verl.checkpoints.folder import LATEST_FILE, CheckpointFolder, step_name, step_of, steps_among, surplus
from xbai.errors import UserError, one_line
from xbai.files import atomic_write

logger = logging.getLogger(__name__)

COMPLETE_FILE = "complete.json"
RETRY_DELAYS_S = (2.0, 10.0, 60.0)


def is_url(path: str | None) -> bool:
    """Whether a path names a file system, as in `s3://bucket/folder`."""
    return path is not None and "://" in path


def is_folder(url: str, folder: str | Path) -> bool:
    """Whether a URL, or a path, names this folder of this machine."""
    protocol, path = split_protocol(url)
    return protocol in (None, "file", "local") and Path(path).expanduser().resolve() == Path(folder).resolve()


def check_url(key: str, url: str) -> None:
    """Make sure that there is a file system for a URL, or a path of this machine; connects to nothing.

    Raises:
        UserError: a URL written wrong, or the package for it is missing.
    """
    protocol, _ = split_protocol(url)
    if protocol is None:
        if ":" in url.partition("/")[0]:
            raise UserError(f"{key}={url} must be a folder, or a URL such as s3://bucket/folder or hdfs://host/folder")
        return
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}={url}: {error}") from error


class RemoteFolder:
    """Checkpoints under a URL.

    Args:
        url: of the folder; or a path of this machine.
        max_to_keep: how many checkpoints stay; None for all.
        key: the configuration key that names it, for messages.

    Raises:
        UserError: the file system cannot be used; of all methods but `upload`, too.
    """

    def __init__(self, url: str, max_to_keep: int | None = None, key: str = "trainer.default_hdfs_dir") -> None:
        check_url(key, url)
        self.url, self._max_to_keep, self._key = url.rstrip("/"), max_to_keep, key
        with self._user_errors():
            self._files, self._root = url_to_fs(self.url)

    def latest(self) -> int | None:
        """The newest whole checkpoint's step; None where there is none."""
        with self._user_errors():
            pointer = f"{self._root}/{LATEST_FILE}"
            if not self._files.exists(pointer):
                return None
            latest = int(self._files.cat_file(pointer))
            # A run that went back replaces checkpoints of the one before, and may have been killed at this one.
            earlier = sorted((step for step in self._steps() if step <= latest), reverse=True)
            return next((step for step in earlier if self._is_whole(step)), latest)

    def try_writing(self) -> None:
        """Write a small file and remove it; a `UserError` where the file system does not take it."""
        probe = f"{self._root}/.try_{uuid.uuid4().hex}"
        with self._user_errors():
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(probe, b"try")
            self._files.rm_file(probe)

    def upload(self, checkpoint: Path) -> None:
        """Copy a checkpoint; name it as the latest when every file has arrived; drop old ones. Raises whatever the
        file system does."""
        target = f"{self._root}/{checkpoint.name}"
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}
        sizes.pop(COMPLETE_FILE, None)
        self._discard(checkpoint.name)
        for folder in {f"{target}/{name}".rpartition("/")[0] for name in sizes}:
            self._files.makedirs(folder, exist_ok=True)
        self._files.put([str(checkpoint / name) for name in sizes], [f"{target}/{name}" for name in sizes])
        self._files.invalidate_cache()
        for name, size in sizes.items():
            if (arrived := self._files.size(f"{target}/{name}")) != size:
                raise OSError(f"{target}/{name} has {arrived} of {size} bytes")
        manifest = json.dumps({"id": uuid.uuid4().hex, "files": sizes})
        # The local checkpoint keeps it too, and is known again as the same one.
        with atomic_write(checkpoint / COMPLETE_FILE, "w") as stream:
            stream.write(manifest)
        self._files.pipe_file(f"{target}/{COMPLETE_FILE}", manifest.encode())
        self._files.pipe_file(f"{self._root}/{LATEST_FILE}", str(step_of(checkpoint)).encode())
        if self._max_to_keep is not None:
            for step in surplus(self._steps(), step_of(checkpoint), self._max_to_keep):
                self._discard(step_name(step))

    def check(self, name: str) -> None:
        """Raise a `UserError` unless a whole checkpoint `name` (`global_step_N`) is there."""
        step = step_of(Path(name))
        with self._user_errors():
            if not self._is_whole(step):
                raise UserError(f"{self._key}: {self.url}/{name} is no complete checkpoint (it has no {COMPLETE_FILE})")

    def fetch(self, name: str, into: CheckpointFolder) -> Path:
        """Copy the checkpoint `name` (`global_step_N`) into the local folder, or find it there already.

        Raises:
            UserError: there is no whole checkpoint of this name, or another one lies in its place.
        """
        self.check(name)
        step, source = step_of(Path(name)), f"{self._root}/{name}"
        local = into.step_folder(step)
        with self._user_errors():
            manifest = self._files.cat_file(f"{source}/{COMPLETE_FILE}").decode()
            if local.exists():
                self._check_same(local, manifest)
                return local
            logger.info("fetching %s/%s to %s", self.url, name, local)
            with into.write(step) as folder:
                self._download(source, json.loads(manifest)["files"], folder)
                (folder / COMPLETE_FILE).write_text(manifest, encoding="utf-8")
        return local

    def _download(self, source: str, sizes: dict[str, int], folder: Path) -> None:
        check_inside(f"{source}/{COMPLETE_FILE}", sizes)
        for name in sizes:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        self._files.get([f"{source}/{name}" for name in sizes], [str(folder / name) for name in sizes])
        for name, size in sizes.items():
            if (arrived := (folder / name).stat().st_size) != size:
                raise OSError(f"{source}/{name} came with {arrived} of {size} bytes")
        try:
            check_checkpoint(folder)
        except UserError as error:
            raise UserError(f"{self._key}: {source} did not come as it was written: {error}") from error

    def _check_same(self, local: Path, manifest: str) -> None:
        known = local / COMPLETE_FILE
        if not known.exists() or known.read_text(encoding="utf-8") != manifest:
            raise UserError(
                f"{self._key}: {self.url}/{local.name} would replace {local}, which is another checkpoint; remove "
                "that, or choose another trainer.default_local_dir"
            )

    def _steps(self) -> list[int]:
        paths = self._files.ls(self._root, detail=False)
        return steps_among(path.rstrip("/").rpartition("/")[2] for path in paths)

    def _is_whole(self, step: int) -> bool:
        return self._files.exists(f"{self._root}/{step_name(step)}/{COMPLETE_FILE}")

    def _discard(self, name: str) -> None:
        """Delete a checkpoint, of which a reader sees all or nothing."""
        folder = f"{self._root}/{name}"
        if self._files.exists(f"{folder}/{COMPLETE_FILE}"):
            self._files.rm_file(f"{folder}/{COMPLETE_FILE}")
        if self._files.exists(folder):
            self._files.rm(folder, recursive=True)

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # File systems raise what they like: missing libraries, credentials, addresses.
            why = f"{type(error).__name__}: {one_line(error)[:300]}"
            raise UserError(f"{self._key}={self.url} cannot be used: {why}") from error


class Uploads:
    """Copies checkpoints to a remote folder one after another, while training goes on.

    A copy that fails is tried again after each of `retry_delays_s`, and then given up with an error in the log: the
    local checkpoint stays, the next one is tried again. Where copying is slower than saving, the newest one waiting is
    copied and the others are passed over.
    """

    def __init__(self, remote: RemoteFolder, retry_delays_s: Sequence[float] = RETRY_DELAYS_S) -> None:
        self.remote, self._retry_delays_s = remote, retry_delays_s
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._running: Path | None = None
        self.failed: list[Path] = []
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    @property
    def in_use(self) -> set[int]:
        """Steps of checkpoints that are still to be read."""
        with self._changed:
            return {step_of(path) for path in (self._waiting, self._running) if path is not None}

    def submit(self, checkpoint: Path) -> None:
        """Copy a checkpoint as soon as the one before is done."""
        with self._changed:
            if self._waiting is not None:
                logger.warning("%s is not copied to %s: a newer one is there first", self._waiting, self.remote.url)
            self._waiting = checkpoint
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when everything submitted is copied or given up."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._running is None)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                checkpoint, self._waiting = self._waiting, None
                self._running = checkpoint
            succeeded = self._upload(checkpoint)
            with self._changed:
                self.failed = [] if succeeded else [*self.failed, checkpoint]
                self._running = None
                self._changed.notify_all()

    def _upload(self, checkpoint: Path) -> bool:
        for delay_s in (0.0, *self._retry_delays_s):
            time.sleep(delay_s)
            try:
                self.remote.upload(checkpoint)
            except Exception as error:
                text = one_line(error)[:300]
                logger.warning("copying %s to %s: %s: %s", checkpoint.name, self.remote.url, type(error).__name__, text)
            else:
                logger.info("copied %s to %s", checkpoint.name, self.remote.url)
                return True
        logger.error("%s could not be copied to %s; it stays where it is", checkpoint, self.remote.url)
        return False
