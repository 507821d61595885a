"""Commands made of dataclasses: their flags, their help, and what they read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

from xbai.cli import app
from xbai.options import command_of

SERVICE = (
    "model_path ip port dtype max_model_len max_pending request_timeout max_body_mb shutdown_timeout log_format "
    "api_key api_key_file"
)
POLICY = (
    f"{SERVICE} engine with_scores no_scores tensor_parallel_size gpu_memory_utilization replicas effort effort_budget "
    "reasoning_field served_model_name openwebui_status page no_page"
)
FLAGS = {
    "serve": POLICY,
    "serve-policy": POLICY,
    "serve-on-ray": f"{POLICY} max_replicas target_candidates cpus_per_replica gpus_per_replica",
    "serve-score": f"{SERVICE} score_model_dim lang max_batch_tokens",
    "infer": "task input_file output_file model_dir response_api_url score_api_url n_samples branch effort temperature "
    "top_p top_k repetition_penalty max_tokens stop seed response_num max_in_flight score_source search beam_width "
    "expand token_budget max_steps step_value exploration budget answer_once total_parts part max_questions "
    "release start_date end_date request_timeout patience api_key api_key_file",
    "metric": "task result_paths N compare json markdown plot calibration",
    "calibrate": "task model_path",
    "replay": "task budget n tolerance calibration json markdown plot",
    "summary": "task base_results rl_results output held_out held_out_base calibration score_setting plot "
    "seconds_total",
    "features": "model_path output task layers lang dtype max_batch_tokens",
}
"""That command lines in use have."""


@dataclass(frozen=True)
class Inner:
    """Options that stand among others."""

    seconds: Annotated[float, typer.Option("--patience", min=0)] = 3.0
    """How long
    to wait."""
    attempts: int = 5


@dataclass(frozen=True)
class Common:
    """Options of several commands."""

    port: int = 1
    """Where."""


@dataclass(frozen=True)
class Options(Common):
    """Of a command that does nothing."""

    port: int = 2
    first: Annotated[tuple[str, ...], typer.Argument(metavar="FILE")] = ()
    """Files."""
    max_tokens: Annotated[int | None, typer.Option(envvar="MAX_TOKENS")] = None
    """Tokens."""
    stop: tuple[str, ...] = ()
    """Stops."""
    sizes: Annotated[tuple[int, ...] | None, typer.Option(parser=lambda text: tuple(map(int, text.split(","))))] = None
    """Sizes."""
    flag: Annotated[bool | None, typer.Option("--flag/--no_flag")] = None
    """A flag."""
    inner: Inner = field(default_factory=Inner)


def run(*arguments: str, **environment: str) -> tuple[Result, list[Options]]:
    given: list[Options] = []
    script = typer.Typer()
    script.command()(command_of(given.append, Options))
    return CliRunner().invoke(script, arguments, env=environment), given


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", Options()),
        ("a --port 3 b", Options(port=3, first=("a", "b"))),
        ("--stop x --stop y", Options(stop=("x", "y"))),
        ("--sizes 1,2,3 --max_tokens=7", Options(sizes=(1, 2, 3), max_tokens=7)),
        ("--flag", Options(flag=True)),
        ("--no_flag --patience 0", Options(flag=False, inner=Inner(0.0))),
    ],
)
def test_a_dataclass_is_read(arguments: str, expected: Options) -> None:
    assert run(*arguments.split())[1] == [expected]


def test_the_environment_is_read() -> None:
    assert run(MAX_TOKENS="9")[1] == [Options(max_tokens=9)]


@pytest.mark.parametrize("arguments", ["--patience -1", "--port x", "--attempts 1", "--max-tokens 1", "--sizes a"])
def test_what_is_no_option_or_value_is_refused(arguments: str) -> None:
    result, given = run(*arguments.split())
    assert (result.exit_code, given) == (2, [])
    assert arguments.split()[0] in result.output


def test_docstrings_are_the_help() -> None:
    words = " ".join(run("--help", COLUMNS="200")[0].output.split())
    for text in ("Where. [default: 2]", "How long to wait. [default: 3.0]", "[env var: MAX_TOKENS]", "--no_flag"):
        assert text in words
    assert "attempts" not in words


@pytest.mark.parametrize("name", FLAGS)
def test_every_command_has_its_flags_and_help_for_each(name: str) -> None:
    parameters: list[Any] = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    names = {flag for one in parameters for flag in (*one.opts, *one.secondary_opts) if flag.startswith("--")}
    assert names == {f"--{flag}" for flag in FLAGS[name].split()}
    assert all(one.help for one in parameters)
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("xbai.cli", "torch transformers httpx fastapi matplotlib"),
        ("xbai.measure.metric_command", "torch httpx"),
        ("xbai.infer.run", "torch matplotlib"),
        ("xbai.serve.front.service", "torch transformers matplotlib"),
    ],
)
def test_a_command_begins_without_what_it_does_not_need(module: str, absent: str) -> None:
    script = f"import sys, {module}; sys.exit(' '.join(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.strip() == ""
