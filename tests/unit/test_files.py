"""Nothing is ever half written."""

import subprocess
import sys

import pytest

from xbai.files import atomic_directory, atomic_write


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as stream:
        stream.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as folder:
        (folder / "x").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_success_takes_the_name(tmp_path):
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "x").write_text("x")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "x").read_text() == "x"
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "d"):
        pass
    with atomic_directory(tmp_path / "d", replace=True) as folder:
        (folder / "y").write_text("y")
        assert (tmp_path / "d" / "x").exists()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    code = "import os,sys\nfrom xbai.files import atomic_write\nwith atomic_write(sys.argv[1],'w') as s:\n"
    code += " s.write('new'); s.flush(); os.kill(os.getpid(), 9)\n"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old"
