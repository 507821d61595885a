"""Whether torch.compile can build kernels on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil

from xbai.errors import UserError


def check_compiler(setting: str, device: str) -> None:
    """Raise a `UserError` where `setting` asks for compiled kernels that this machine cannot build.

    For the device `cpu` torch.compile writes C++, for `cuda` Triton. The message begins with `setting` (`key=value`).
    """
    variable, programs = ("CXX", ("g++", "clang++")) if device == "cpu" else ("CC", ("gcc", "clang", "cc"))
    candidates = (os.environ[variable],) if os.environ.get(variable) else programs
    if not any(map(shutil.which, candidates)):
        raise UserError(
            f"{setting} needs a compiler for its kernels, and none of {', '.join(candidates)} is here; "
            f"install one (apt install g++), name one in {variable}, or leave the key at its default"
        )
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(f"{setting} needs triton for its kernels (pip install triton)")
