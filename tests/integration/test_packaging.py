"""What of the two packages is installed, from a copy of the working tree: wheels, and editable installs."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
PROJECTS = {"xbai": ".", "xbai-verl": "verl"}


@pytest.fixture(scope="module", params=list(PROJECTS))
def project(request, checkout) -> tuple[str, Path]:
    """The name of a distribution, and the folder it is built from."""
    return request.param, checkout.root / PROJECTS[request.param]


def build(kind: str, folder: Path, out: Path) -> zipfile.ZipFile:
    """The wheel that the build backend makes of `folder`; `kind` is `build_wheel` or `build_editable`."""
    subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=folder, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_a_wheel_holds_the_package_with_its_files_types_and_licence(project: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = project
    package = name.removeprefix("xbai-")
    with build("build_wheel", folder, tmp_path) as wheel:
        held = {member for member in wheel.namelist() if ".dist-info/" not in member}
        metadata = email.message_from_bytes(wheel.read(next(m for m in wheel.namelist() if m.endswith("/METADATA"))))
        assert any(member.endswith("/licenses/LICENSE") for member in wheel.namelist())
    kinds = (".py", ".yaml", "py.typed")
    files = {str(path.relative_to(folder)) for path in (folder / package).rglob("*") if path.name.endswith(kinds)}
    files |= {str(path.relative_to(folder)) for path in (folder / package / "serve/web").rglob("*") if path.is_file()}
    assert f"{package}/py.typed" in held
    assert held == files
    assert metadata["Name"] == name


def test_an_editable_install_is_a_line_of_a_path(project: tuple[str, Path], tmp_path: Path) -> None:
    """So that it comes before the folder `verl/` of the repository, a namespace package to who stands at its root."""
    _, folder = project
    with build("build_editable", folder, tmp_path) as wheel:
        (pth,) = [member for member in wheel.namelist() if member.endswith(".pth")]
        assert wheel.read(pth).decode().split() == [str(folder)]
        assert not [member for member in wheel.namelist() if member.endswith(".py")]
