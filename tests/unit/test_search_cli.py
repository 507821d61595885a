"""Flags that cannot be, or do not go together, are refused in one line, before anything is read or asked."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from xbai.cli import app

FLAGS = (
    *("--task", "make10", "--input_file", "in", "--output_file", "out", "--model_dir", "model"),
    *("--response_api_url", "http://127.0.0.1:9"),
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--search beam --branch 2", "give --beam_width and --expand instead of --branch"),
        ("--search mcts --token_budget 100 --effort low", "instead of --effort"),
        ("--search mcts", "--search mcts needs --token_budget"),
        ("--beam_width 2", "--beam_width does not act on --search best_of_n, only on beam, dvts, mcts"),
        (
            "--search beam --score_source none",
            "--score_source none: --search beam is guided by scores; use fused or service",
        ),
        ("--search tree", "--search 'tree': use one of best_of_n, majority"),
        ("--effort high --branch 2", "--effort high means --branch 32, not 2"),
        ("--top_p 0", "--top_p 0.0: Input should be greater than 0"),
        ("--response_num 2000", "--response_num 2000: Input should be less than or equal to 1024"),
    ],
)
def test_wrong_flags(flags: str, message: str) -> None:
    result = CliRunner().invoke(app, ["infer", *FLAGS, *flags.split()])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
