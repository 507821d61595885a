"""Whose `verl` is installed: where the public project's is, too, a command ends in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl.distribution import check_distribution
from verl.trainer import main_ppo, main_score, main_sft
from xbai.errors import UserError

OF_A_WHEEL = "verl/__init__.py,sha256=0,1\nverl/protocol.py,sha256=0,1\n"
OF_AN_EDITABLE_INSTALL = "__editable__.verl-0.7.1.pth,sha256=0,1\n"


def install(folder: Path, name: str, files: dict[str, str]) -> Path:
    """What an installer leaves of the distribution `name` in `folder`, which is to be on `sys.path`."""
    metadata = folder / name
    metadata.mkdir(parents=True)
    for file, text in files.items():
        (metadata / file).write_text(text, encoding="utf-8")
    return folder


def describe(name: str) -> str:
    return f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.7.1\n"


@pytest.fixture
def public_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public project's distribution, as pip installs it from its wheel."""
    files = {"METADATA": describe("verl"), "RECORD": OF_A_WHEEL}
    monkeypatch.syspath_prepend(install(tmp_path / "public", "verl-0.7.1.dist-info", files))


@pytest.mark.parametrize("module", [main_ppo, main_score, main_sft], ids=lambda module: module.__name__)
def test_the_public_distribution_is_one_line(module, public_verl: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: the public project's verl 0.7.1 is installed here, whose files have the names of this trainer's: "
        "pip uninstall verl, then install this one again (pip install -e verl)\n"
    )


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("xbai_verl-0.7.1.dist-info", {"METADATA": describe("xbai-verl"), "RECORD": OF_A_WHEEL}),
        ("verl-0.7.1.dist-info", {"METADATA": describe("verl"), "RECORD": OF_AN_EDITABLE_INSTALL}),
        ("verl.egg-info", {"PKG-INFO": describe("verl"), "SOURCES.txt": "verl/__init__.py\n"}),
    ],
    ids=["ours", "an editable install", "a source folder"],
)
def test_what_has_no_files_among_ours_is_left_alone(
    folder: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, folder, files))
    check_distribution()


def test_the_public_distribution_is_found_behind_an_editable_install(
    tmp_path: Path, public_verl: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"METADATA": describe("verl"), "RECORD": OF_AN_EDITABLE_INSTALL}
    monkeypatch.syspath_prepend(install(tmp_path / "editable", "verl-0.7.1.dist-info", files))
    with pytest.raises(UserError, match=r"verl 0\.7\.1 is installed here"):
        check_distribution()
