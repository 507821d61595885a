"""The command line: `xbai serve | infer | metric | calibrate | replay | plot | summary ...`.

The scripts under `test/` are these commands under the names that users of XBai o4 know.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from xbai.errors import UserError, exit_on_user_error
from xbai.infer.options import RunOptions
from xbai.logs import configure_logging
from xbai.measure.options import CalibrateOptions, FeatureFilesOptions, MetricOptions, ReplayOptions, SummaryOptions
from xbai.options import OptionsT, command_of
from xbai.serve.options import OnRayOptions, PolicyOptions, ScoreOptions

PLOTS = "xbai.plots"
"""Entry points of other packages, of commands (see `as_command`) that draw what they know."""

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)


def as_command(run: Callable[[OptionsT], None], options: type[OptionsT]) -> Callable[..., None]:
    """`run` as a command with these options (see `command_of`); a `UserError` in it is one line and exit status 2."""
    command = command_of(run, options)

    @functools.wraps(command)
    def logged(**values: Any) -> None:
        share_cores()
        configure_logging("text")
        # One line per request of the driver would drown its progress.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        command(**values)

    return exit_on_user_error(logged)


def _command(name: str, options: type[OptionsT]) -> Callable[[Callable[[OptionsT], None]], Callable[..., None]]:
    return lambda run: app.command(name)(as_command(run, options))


def share_cores() -> None:
    """Let waiting OpenMP threads give way to other processes soon, unless the user says how they wait.

    Two services on the same cores took three times as long for a response while each spun for the other. To be called
    before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def run_command(command: Callable[..., Any], arguments: Sequence[str] | None = None) -> None:
    """Run one command as a script of its own, with the arguments of this process where none are given."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(command)
    script(args=arguments)


@_command("serve", PolicyOptions)
def serve(options: PolicyOptions) -> None:
    """Serve a model to any OpenAI client, and with POST /generate and POST /score, from one process."""
    _serve_policy(options, with_score_routes=True)


@_command("serve-policy", PolicyOptions)
def serve_policy(options: PolicyOptions) -> None:
    """Serve a model's responses: POST /generate, and OpenAI's routes."""
    _serve_policy(options, with_score_routes=False)


@_command("serve-on-ray", OnRayOptions)
def serve_on_ray(options: OnRayOptions) -> None:
    """Serve a model as `serve` does, from the machines of a Ray cluster (RAY_ADDRESS), or from this one alone."""
    configure_logging(options.log_format)
    try:
        from xbai.serve.on_ray import run_on_ray
    except ModuleNotFoundError as error:
        raise UserError(f'serve-on-ray: {error.name} is not installed; pip install -e ".[ray]"') from None

    run_on_ray(options)


def _serve_policy(options: PolicyOptions, with_score_routes: bool) -> None:
    configure_logging(options.log_format)
    if options.replicas is not None:
        from xbai.serve.front.service import run_replicated_service

        run_replicated_service(options, options.replicas, with_score_routes)
    else:
        from xbai.serve.policy import run_policy_service

        run_policy_service(options, with_score_routes)


@_command("serve-score", ScoreOptions)
def serve_score(options: ScoreOptions) -> None:
    """Serve a model's judgement: POST /score."""
    from xbai.serve.score import run_score_service

    configure_logging(options.log_format)
    run_score_service(options)


@_command("infer", RunOptions)
def infer(options: RunOptions) -> None:
    """Generate and score responses to a benchmark."""
    from xbai.infer.run import run

    run(options)


@_command("metric", MetricOptions)
def metric(options: MetricOptions) -> None:
    """Grade results: pass@1 of Best-of-N over all disjoint groups of N, then every strategy at every N."""
    from xbai.measure.metric_command import run_metric

    run_metric(options)


@_command("calibrate", CalibrateOptions)
def calibrate(options: CalibrateOptions) -> None:
    """Learn what a score says: with the log-prob, and as a probability; writes sprm_calibration.json."""
    from xbai.measure.calibrate import run_calibrate

    run_calibrate(options)


@_command("replay", ReplayOptions)
def replay(options: ReplayOptions) -> None:
    """Find out on stored samples which budget is as good as Best-of-N for fewer tokens."""
    from xbai.measure.replay_command import run_replay

    run_replay(options)


@app.command("plot", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@exit_on_user_error
def plot(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="training.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="OPTIONS", help="What it draws, and where; see plot KIND --help.")
    ] = None,
) -> None:
    """Draw a training's curves; figures of results come from metric --plot and summary --plot."""
    plots = entry_points(group=PLOTS)
    if kind not in plots.names:
        known = (
            ", ".join(sorted(plots.names))
            or "none, as the trainer is not installed (pip install -e verl, again where it was before)"
        )
        raise UserError(
            f"plot {kind!r}: known are {known}, before all options; metric --plot and summary --plot draw results"
        )
    run_command(plots[kind].load(), arguments or [])


@_command("summary", SummaryOptions)
def summary(options: SummaryOptions) -> None:
    """Compare a model before and after RL."""
    from xbai.measure.summary import run_summary

    run_summary(options)


@_command("features", FeatureFilesOptions)
def features(options: FeatureFilesOptions) -> None:
    """Keep what a score head sees of graded responses, to train and compare heads without the model."""
    from xbai.measure.feature_files import FeatureFiles
    from xbai.measure.graded_responses import response_files

    paths = response_files(options.files)
    made = FeatureFiles(options.how, options.output)
    for path in paths:
        typer.echo(made.of(path))
