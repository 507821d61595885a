"""Nothing is ever half written, and nothing but a file is ever replaced."""

import os
import re
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from xbai.errors import UserError
from xbai.files import atomic_directory, atomic_write, check_writable, followed, is_replaced, remove_leftovers

WRITE = "import os, sys\nfrom xbai.files import atomic_write\nwith atomic_write(sys.argv[1], 'w') as stream:\n"
LONG_NAME = "n" * 243


def write(path: Path, text: str = "new") -> None:
    with atomic_write(path, "w") as stream:
        stream.write(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_utf_8_whatever_the_locale_says(tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = f"{WRITE}    stream.write('\\u5206\\u6570')"
    subprocess.run([sys.executable, "-c", code, tmp_path / "file"], env={**os.environ, **ascii_only}, check=True)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "分数"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_write(path, "w") as stream:
        stream.write("new")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as folder:
        (folder / "x").write_text("x", encoding="utf-8")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_success_takes_the_name(tmp_path):
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "x").write_text("x", encoding="utf-8")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "x").read_text(encoding="utf-8") == "x"
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "d"):
        pass
    with atomic_directory(tmp_path / "d", replace=True) as folder:
        (folder / "y").write_text("y", encoding="utf-8")
        assert (tmp_path / "d" / "x").exists()
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old", encoding="utf-8")
    code = WRITE + " stream.write('new'); stream.flush(); os.kill(os.getpid(), 9)\n"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text(encoding="utf-8") == "old"


def test_a_link_is_followed_and_stays(tmp_path):
    target, link, chain = tmp_path / "there" / "target", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("there/target")
    chain.symlink_to(link)
    for text in ("made, as are folders that are missing", "replaced"):
        check_writable(chain)
        write(chain, text)
        assert target.read_text(encoding="utf-8") == text
        assert target.is_file() and not target.is_symlink() and link.is_symlink() and chain.is_symlink()
    assert followed(chain) == target
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chain", "link", "target", "there"]


def test_a_linked_folder_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to("disk/model")
    for text in ("made", "replaced"):
        with atomic_directory(link, replace=True) as folder:
            (folder / text).write_text(text, encoding="utf-8")
        assert [path.name for path in (tmp_path / "disk/model").iterdir()] == [text]
    with pytest.raises(FileExistsError), atomic_directory(link):
        pass
    (tmp_path / "disk" / ".model.0123abcd.tmp").mkdir()
    remove_leftovers(link)
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "d").write_text("old", encoding="utf-8")
    with pytest.raises(FileExistsError), atomic_directory(tmp_path / "d", replace=True):
        pass
    assert (tmp_path / "d").read_text(encoding="utf-8") == "old"


def refused(path: Path, message: str) -> None:
    """Before the work, and, of what can be told by its kind, by the write itself."""
    for attempt in (check_writable, write):
        with pytest.raises(UserError, match=message):
            attempt(path)


def test_links_in_a_circle_are_one_line(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(tmp_path / "a", rf"^{tmp_path}/a: its symbolic links lead in a circle")
    with pytest.raises(UserError, match="lead in a circle"), atomic_directory(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a", "b"]


def test_folders_and_sockets_are_refused_in_one_line(tmp_path):
    refused(tmp_path, "a folder; name a file")
    (tmp_path / "link").symlink_to(tmp_path)
    refused(tmp_path / "link", "a folder; name a file")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        refused(tmp_path / "s", "a socket; name a file")
    assert names(tmp_path) == ["link", "s"]


def test_what_could_not_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path, why in (
        (tmp_path / LONG_NAME, "choose a shorter path"),
        (tmp_path / (LONG_NAME * 2), "choose a shorter path"),
        (tmp_path / "file" / "below", "choose another folder"),
        (Path("/proc/none/file"), "choose another folder"),
    ):
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be written \(.*{why}\)$"):
            check_writable(path)
        with pytest.raises(UserError, match=why):
            write(path)
    assert names(tmp_path) == ["file"]


def test_a_device_receives_the_bytes(tmp_path):
    null = tmp_path / "null"
    try:
        os.mknod(null, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        null.open("w", encoding="utf-8").close()
    except PermissionError:
        pytest.skip("devices cannot be made here")
    (tmp_path / "link").symlink_to(null)
    for path in (null, tmp_path / "link"):
        check_writable(path)
        assert not is_replaced(path)
        write(path)
    assert stat.S_ISCHR(null.stat().st_mode)
    assert names(tmp_path) == ["link", "null"]


def test_a_fifo_receives_the_bytes(tmp_path):
    fifo, received = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: received.append(fifo.read_text(encoding="utf-8")))
    reader.start()
    check_writable(fifo)
    write(fifo, "through")
    reader.join(10)
    assert received == ["through"]
    assert fifo.is_fifo()


@pytest.mark.parametrize("path", ["stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file", "socket"])
def test_the_standard_output_receives_the_bytes_in_their_turn(tmp_path, path, kind):
    # What /dev/stdout is. That one itself is not for a test to put at risk.
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = "print('before', flush=True)\n" + WRITE + " stream.write('between\\n')\nprint('after')\n"
    command = [sys.executable, "-c", code, str(tmp_path / path)]
    if kind == "pipe":
        said = subprocess.run(command, capture_output=True, check=True).stdout
    elif kind == "file":
        with (tmp_path / "out").open("wb") as stream:
            subprocess.run(command, stdout=stream, check=True)
        said = (tmp_path / "out").read_bytes()
    else:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            subprocess.run(command, stdout=theirs, check=True)
            said = ours.recv(100)
    assert said == b"before\nbetween\nafter\n"


def test_a_file_hands_on_its_mode_and_its_owner(tmp_path):
    path = tmp_path / "a"
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~current_umask()
    for mode in (0o600, 0o664, 0o444):
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 4321, 1234)
        before = path.stat()
        with atomic_write(path) as stream:
            assert stat.S_IMODE(os.fstat(stream.fileno()).st_mode) == mode, "also while it is written"
        after = path.stat()
        assert after.st_ino != before.st_ino
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
