"""Copies of checkpoints in a remote folder: whole or not there, retried, and never the end of a run."""

import json
import logging

import fsspec
import pytest
from clocks import wait_until
from fsspec.implementations.memory import MemoryFileSystem

from verl.checkpoints.checksums import file_digest, write_checksums
from verl.checkpoints.folder import LATEST_FILE, CheckpointFolder
from verl.checkpoints.remote import COMPLETE_FILE, RemoteFolder, Uploads, check_url, is_url
from xbai.errors import UserError


class FragileFileSystem(MemoryFileSystem):
    """A file system in memory that fails its next `failures` writes, and cuts them short while `cuts` is set."""

    protocol = "fragile"
    store, pseudo_dirs = {}, [""]
    failures, cuts = 0, False

    def put_file(self, lpath, rpath, **options):
        cls = type(self)
        if cls.failures:
            cls.failures -= 1
            raise ConnectionError("the line is dead")
        super().put_file(lpath, rpath, **options)
        if cls.cuts and rpath.endswith("weights"):
            self.pipe_file(rpath, b"w")


@pytest.fixture(params=["file", "fragile"])
def url(request, tmp_path):
    fsspec.register_implementation("fragile", FragileFileSystem, clobber=True)
    FragileFileSystem.store, FragileFileSystem.pseudo_dirs = {}, [""]
    FragileFileSystem.failures, FragileFileSystem.cuts = 0, False
    return f"file://{tmp_path}/remote" if request.param == "file" else "fragile://runs/one"


def _write(folder, step, text="state"):
    with folder.write(step) as target:
        (target / "actor" / "huggingface").mkdir(parents=True)
        (target / "actor" / "weights").write_text(f"weights {step}", encoding="utf-8")
        (target / "actor" / "huggingface" / "config.json").write_text("{}", encoding="utf-8")
        (target / "data.pt").write_text(text, encoding="utf-8")
    return folder.step_folder(step)


def _names(url):
    files, root = fsspec.core.url_to_fs(url)
    return sorted(path.rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False))


def test_a_copy_comes_back_as_it_was(url, tmp_path):
    remote = RemoteFolder(url)
    assert remote.latest() is None
    checkpoint = _write(CheckpointFolder(tmp_path / "local"), 3)
    remote.upload(checkpoint)
    assert remote.latest() == 3

    elsewhere = CheckpointFolder(tmp_path / "elsewhere")
    fetched = RemoteFolder(url).fetch("global_step_3", elsewhere)
    assert elsewhere.find("auto", None) == fetched
    for path in checkpoint.rglob("*"):
        assert path.is_dir() or (fetched / path.relative_to(checkpoint)).read_bytes() == path.read_bytes()
    # Asked again, by the same command after a crash, it is already there; another checkpoint's place is not taken.
    assert remote.fetch("global_step_3", elsewhere) == fetched
    other = CheckpointFolder(tmp_path / "other")
    _write(other, 3, "another state")
    with pytest.raises(UserError, match=r"would replace .*other/global_step_3, which is another checkpoint"):
        remote.fetch("global_step_3", other)


def test_a_copy_that_comes_back_damaged_is_refused_and_not_kept(url, tmp_path):
    checkpoint = _write(CheckpointFolder(tmp_path / "local"), 3)
    write_checksums(checkpoint / "actor", {"weights": file_digest(checkpoint / "actor" / "weights")})
    RemoteFolder(url).upload(checkpoint)
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/global_step_3/actor/weights", b"weights 2")
    elsewhere = CheckpointFolder(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"global_step_3 did not come as it was written: .*actor/weights is damaged"
    ) as e:
        RemoteFolder(url).fetch("global_step_3", elsewhere)
    assert "\n" not in str(e.value) and not list(elsewhere.folder.iterdir())


@pytest.mark.parametrize("name", ["../../outside", "/outside", "actor/../../../outside"])
def test_a_copy_is_not_written_outside_of_its_folder(name, url, tmp_path):
    RemoteFolder(url).upload(_write(CheckpointFolder(tmp_path / "local"), 3))
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/global_step_3/{COMPLETE_FILE}", json.dumps({"id": "1", "files": {name: 9}}).encode())
    elsewhere = CheckpointFolder(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{COMPLETE_FILE} names '{name}', which is no file of this checkpoint"):
        RemoteFolder(url).fetch("global_step_3", elsewhere)
    assert not list(elsewhere.folder.iterdir())


def test_only_the_newest_are_kept(url, tmp_path):
    remote, local = RemoteFolder(url, max_to_keep=2), CheckpointFolder(tmp_path / "local")
    for step in (2, 4, 10):
        remote.upload(_write(local, step))
    assert _names(url) == ["global_step_10", "global_step_4", LATEST_FILE]


def test_a_copy_that_was_cut_off_is_not_a_checkpoint(url, tmp_path):
    remote, local = RemoteFolder(url), CheckpointFolder(tmp_path / "local")
    remote.upload(_write(local, 1))
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(f"{root}/global_step_2/actor", exist_ok=True)
    files.pipe_file(f"{root}/global_step_2/data.pt", b"state")
    assert remote.latest() == 1
    with pytest.raises(UserError, match=rf"global_step_2 is no complete checkpoint \(it has no {COMPLETE_FILE}\)"):
        remote.fetch("global_step_2", CheckpointFolder(tmp_path / "elsewhere"))
    remote.upload(_write(local, 2))
    assert remote.latest() == 2
    # A run that went back to step 1 was killed as it replaced the copy of step 2.
    files.rm_file(f"{root}/global_step_2/{COMPLETE_FILE}")
    files.invalidate_cache()
    assert RemoteFolder(url).latest() == 1


@pytest.mark.parametrize("url", ["fragile"], indirect=True)
class TestUploads:
    """Copying while the run goes on."""

    def test_a_failure_is_tried_again(self, url, tmp_path, caplog):
        FragileFileSystem.failures = 2
        uploads = Uploads(RemoteFolder(url), retry_delays_s=(0.01, 0.01))
        uploads.submit(_write(CheckpointFolder(tmp_path), 1))
        uploads.wait()
        assert RemoteFolder(url).latest() == 1 and not uploads.failed
        assert caplog.text.count("ConnectionError: the line is dead") == 2

    @pytest.mark.parametrize("fault", ["failures", "cuts"])
    def test_giving_up_keeps_the_local_copy_and_the_one_before(self, fault, url, tmp_path, caplog):
        uploads, local = Uploads(RemoteFolder(url), retry_delays_s=(0.01,)), CheckpointFolder(tmp_path)
        uploads.submit(_write(local, 1))
        uploads.wait()
        setattr(FragileFileSystem, fault, 100)
        second = _write(local, 2)
        uploads.submit(second)
        uploads.wait()
        assert uploads.failed == [second] and second.is_dir()
        assert RemoteFolder(url).latest() == 1
        assert [r.levelno for r in caplog.records if "could not be copied" in r.message] == [logging.ERROR]
        FragileFileSystem.failures, FragileFileSystem.cuts = 0, False
        uploads.submit(_write(local, 3))
        uploads.wait()
        assert RemoteFolder(url).latest() == 3 and not uploads.failed

    def test_slow_copies_pass_over_what_is_no_longer_the_newest(self, url, tmp_path):
        FragileFileSystem.failures = 1
        uploads, local = Uploads(RemoteFolder(url), retry_delays_s=(1.5,)), CheckpointFolder(tmp_path)
        for step in (1, 2, 3):
            uploads.submit(_write(local, step))
            if step == 1:
                wait_until(lambda: not FragileFileSystem.failures, "the first copy has failed")
        assert uploads.in_use == {1, 3}
        uploads.wait()
        assert _names(url) == ["global_step_1", "global_step_3", LATEST_FILE]
        assert uploads.in_use == set()


def test_urls_are_checked_before_anything_starts():
    assert is_url("s3://bucket/run") and not is_url("checkpoints/run") and not is_url(None)
    for url in ("file:///folder", "./outputs/", "checkpoints/run", "~/run", "/folder"):
        check_url("trainer.default_hdfs_dir", url)
    for url, complaint in [
        ("s3://bucket/run", "s3fs"),
        ("nowhere://bucket/run", "not known"),
        ("s3:/bucket/run", "must be a folder, or a URL"),
    ]:
        with pytest.raises(UserError, match=rf"trainer\.default_hdfs_dir={url}.*{complaint}"):
            check_url("trainer.default_hdfs_dir", url)
