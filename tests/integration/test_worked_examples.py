"""The pages that say how to add something do so by an example, which is carried out here to the letter.

Of a page, in its order: Python under the name of a file is written there, a diff is applied, and the commands of a
console print what stands below them (`...` stands for anything).
"""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from xbai.engine import load_engine
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app

REPOSITORY = Path(__file__).parents[2]
PARTS = ("xbai", "verl/verl", "examples", "test")
BLOCK = re.compile(r"(?:^`(?P<path>[\w./]+)`:\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Copy:
    """A copy of the packages, to which a page's changes are made."""

    root: Path

    def follow(self, page: str, stands_for: Mapping[str, str] = MappingProxyType({})) -> None:
        """Carry out `docs/PAGE`; `stands_for` says what texts of its commands are on this machine."""
        text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
        for block in BLOCK.finditer(text):
            match block["kind"]:
                case "python" | "json" if block["path"]:
                    self.write(block["path"], block["text"])
                case "diff":
                    self.run(["git", "apply", "-"], block["text"])
                case "console":
                    for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block["text"], re.M):
                        for there, here in stands_for.items():
                            command = command.replace(there, here)
                        self.check(command, output)
                case kind:
                    pytest.fail(f"{page}: a block of {kind} that nothing is done with:\n{block['text']}")

    def write(self, path: str, content: str) -> None:
        target = self.root / path
        assert not target.exists(), f"{path} is there already"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")

    def check(self, command: str, expected: str) -> None:
        printed = self.run(["bash", "-c", command])
        assert doctest.OutputChecker().check_output(expected, printed, SAME), f"$ {command}\n{printed}"

    def run(self, command: list[str], given: str | None = None) -> str:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.root}:{self.root}/verl",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        }
        done = subprocess.run(command, cwd=self.root, env=environment, input=given, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    for part in PARTS:
        shutil.copytree(REPOSITORY / part, tmp_path / part)
    return Copy(tmp_path)


def test_a_new_grader(copy: Copy):
    copy.follow("new_grader.md")


@pytest.mark.slow
def test_a_new_benchmark(copy: Copy, serve_app: Callable[..., str], tiny_model_dir: Path):
    engine = EngineThread(lambda: load_engine("hf", tiny_model_dir))
    url = serve_app(create_policy_app(engine, str(tiny_model_dir), Limits()))
    copy.follow("new_benchmark.md", {"http://127.0.0.1:8000": url, "outputs/quickstart/model": str(tiny_model_dir)})


@pytest.mark.long
def test_fused_scores_of_a_new_architecture(copy: Copy):
    pytest.importorskip("vllm")
    copy.follow("new_architecture.md")


@pytest.mark.slow
def test_a_new_loss(copy: Copy):
    copy.follow("new_loss.md")
