"""`scripts/docs.sh` renders the docstrings."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def render(folder: Path, *modules: str) -> None:
    command = ["bash", "scripts/docs.sh", str(folder), *modules]
    environment = {**os.environ, "XBAI_VENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}/index.html\n"


def text_of(page: Path) -> str:
    """What is read on a page, without its markup."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8"))).split())


@pytest.mark.slow
def test_a_docstring_becomes_a_page(tmp_path: Path):
    render(tmp_path, "xbai.sprm")
    page = text_of(tmp_path / "xbai/sprm/loss.html")
    assert "This micro-batch's share of the class-balanced mean of w_n * BCE(score_n, y)." in page
    assert re.search(r"Arguments: step_logits: values off `?counted`? are ignored\. counted: from", page)
    assert "batch time" in text_of(tmp_path / "xbai/sprm/steps.html"), "of what shape they are"
    assert not (tmp_path / "xbai/grading").exists()


@pytest.mark.long
def test_every_module_has_a_page(tmp_path: Path):
    render(tmp_path)
    for package in ("xbai", "verl/verl"):
        root = (REPOSITORY / package).parent
        for module in (REPOSITORY / package).rglob("*.py"):
            name = module.relative_to(root).with_suffix("")
            name = name.parent if name.name == "__init__" else name
            if name.name != "__main__":
                assert (tmp_path / f"{name}.html").is_file(), name
