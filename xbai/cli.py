"""The command line: `xbai serve-policy | serve-score | infer | metric | calibrate | plot | summary | features`.

The scripts under `test/` are these commands under the names that users of XBai o4 know.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from xbai.api_key import API_KEY_VARIABLE, read_api_key
from xbai.errors import UserError, exit_on_user_error
from xbai.evaluate.client import RetryPolicy
from xbai.evaluate.options import RunOptions, branch_for
from xbai.logs import configure_logging

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)

ModelPath = Annotated[str, typer.Option("--model_path", help="A Hugging Face model folder.")]
Ip = Annotated[str, typer.Option("--ip", help="Address to listen on; 0.0.0.0 for every interface, :: also by IPv6.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0 picks a free one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
MaxModelLen = Annotated[int | None, typer.Option("--max_model_len", min=2, help="Longest prompt plus response.")]
RequestTimeout = Annotated[float, typer.Option("--request_timeout", min=0.001, help="Seconds to an answer; then 504.")]
MaxBody = Annotated[int, typer.Option("--max_body_mb", min=1, help="Largest request body in MiB; beyond it 413.")]
ShutdownTimeout = Annotated[float, typer.Option("--shutdown_timeout", min=0, help="Seconds to finish after SIGTERM.")]
LogFormat = Annotated[str, typer.Option("--log_format", help="json (an object a line) or text.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api_key",
        envvar=API_KEY_VARIABLE,
        help="Secret of the services; other users of the machine can read a command line, so prefer the variable.",
    ),
]
ApiKeyFile = Annotated[Path | None, typer.Option("--api_key_file", help="A file that holds the key.")]


def _command(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command; a `UserError` in it is one line and exit status 2."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def logged(*args: Any, **kwargs: Any) -> Any:
            share_cores()
            configure_logging("text")
            # One line per request of the driver would drown its progress.
            logging.getLogger("httpx").setLevel(logging.WARNING)
            return function(*args, **kwargs)

        return app.command(name)(exit_on_user_error(logged))

    return register


def share_cores() -> None:
    """Let waiting OpenMP threads give way to other processes soon, unless the user says how they wait.

    Two services on the same cores took three times as long for a response while each spun for the other. To be called
    before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def run_command(command: Callable[..., Any]) -> None:
    """Run one command as a script of its own."""
    script = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    script.command()(command)
    script()


@_command("serve-policy")
def serve_policy(
    model_path: ModelPath,
    ip: Ip = "127.0.0.1",
    port: Port = 8000,
    engine: Annotated[str, typer.Option("--engine", help="vllm, hf, or auto.")] = "auto",
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    with_scores: Annotated[
        bool | None,
        typer.Option(
            "--with_scores/--no_scores",
            help="Offer scores with the responses; by default where score_module.pt exists.",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor_parallel_size", min=1, help="GPUs that share the model (vllm).")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option("--gpu_memory_utilization", min=0.01, max=1, help="Share of a GPU's memory to take (vllm)."),
    ] = None,
    max_pending: Annotated[int, typer.Option("--max_pending", min=1, help="Responses queued; beyond it 429.")] = 4096,
    request_timeout: RequestTimeout = 3600.0,
    max_body_mb: MaxBody = 16,
    shutdown_timeout: ShutdownTimeout = 60,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    log_format: LogFormat = "json",
) -> None:
    """Serve a model's responses: POST /generate."""
    from xbai.serve.limits import Limits
    from xbai.serve.run import serve_policy

    configure_logging(log_format)
    serve_policy(
        model_path,
        ip,
        port,
        Limits(
            max_pending=max_pending,
            request_timeout_s=request_timeout,
            max_body_bytes=max_body_mb << 20,
            shutdown_timeout_s=shutdown_timeout,
            api_key=read_api_key(api_key, api_key_file),
        ),
        engine=engine,
        with_scores=with_scores,
        dtype=dtype,
        max_model_len=max_model_len,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
    )


@_command("serve-score")
def serve_score(
    model_path: ModelPath,
    score_model_dim: Annotated[
        int | None, typer.Option("--score_model_dim", help="The model's hidden size, checked where given.")
    ] = None,
    lang: Annotated[
        str | None, typer.Option("--lang", help="Step rule: en or zh; by default the one that travels with the model.")
    ] = None,
    ip: Ip = "127.0.0.1",
    port: Port = 8001,
    dtype: Dtype = "auto",
    max_model_len: MaxModelLen = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            "--max_batch_tokens", min=1, help="Most tokens of one forward pass; by default what suits the device."
        ),
    ] = None,
    max_pending: Annotated[int, typer.Option("--max_pending", min=1, help="Texts queued; beyond it 429.")] = 1024,
    request_timeout: RequestTimeout = 3600.0,
    max_body_mb: MaxBody = 16,
    shutdown_timeout: ShutdownTimeout = 60,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    log_format: LogFormat = "json",
) -> None:
    """Serve a model's judgement: POST /score."""
    from xbai.serve.limits import Limits
    from xbai.serve.run import serve_score

    configure_logging(log_format)
    serve_score(
        model_path,
        ip,
        port,
        Limits(
            max_pending=max_pending,
            request_timeout_s=request_timeout,
            max_body_bytes=max_body_mb << 20,
            shutdown_timeout_s=shutdown_timeout,
            api_key=read_api_key(api_key, api_key_file),
        ),
        score_model_dim=score_model_dim,
        lang=lang,
        dtype=dtype,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
    )


@_command("infer")
def infer(
    task: Annotated[str, typer.Option("--task", help="Benchmark: aime24, math500, make10, ...")],
    input_file: Annotated[str, typer.Option("--input_file", help="Its questions: .jsonl, .json or .parquet.")],
    output_file: Annotated[str, typer.Option("--output_file", help="Results; begun ones are continued.")],
    model_dir: Annotated[str, typer.Option("--model_dir", help="Model folder, for tokenizer and chat template.")],
    response_api_url: Annotated[str, typer.Option("--response_api_url", help="Policy services, comma-separated.")],
    score_api_url: Annotated[
        str | None, typer.Option("--score_api_url", help="Score services, comma-separated.")
    ] = None,
    n_samples: Annotated[
        int, typer.Option("--n_samples", min=1, help="Repetitions of the Best-of-N test.")
    ] = RunOptions.n_samples,
    branch: Annotated[
        int | None, typer.Option("--branch", min=1, help="Candidates of each; n_samples x branch responses in all.")
    ] = None,
    effort: Annotated[str | None, typer.Option("--effort", help="low, medium or high: branch 2, 8 or 32.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = RunOptions.temperature,
    top_p: Annotated[float, typer.Option("--top_p")] = RunOptions.top_p,
    top_k: Annotated[int, typer.Option("--top_k", help="-1: no limit.")] = RunOptions.top_k,
    repetition_penalty: Annotated[float, typer.Option("--repetition_penalty")] = RunOptions.repetition_penalty,
    max_tokens: Annotated[int, typer.Option("--max_tokens")] = RunOptions.max_tokens,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="May be given several times.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Gives the same samples again.")] = RunOptions.seed,
    response_num: Annotated[
        int, typer.Option("--response_num", help="Responses asked for at once.")
    ] = RunOptions.response_num,
    max_in_flight: Annotated[
        int, typer.Option("--max_in_flight", min=1, help="Requests at one URL.")
    ] = RunOptions.max_in_flight,
    score_source: Annotated[
        str,
        typer.Option(
            "--score_source",
            help="fused (with the responses), service, none, or auto: fused where they are the same, else the service.",
        ),
    ] = RunOptions.score_source,
    search: Annotated[
        str, typer.Option("--search", help="best_of_n, majority or weighted_vote; or by steps: beam, dvts or mcts.")
    ] = "best_of_n",
    beam_width: Annotated[
        int | None, typer.Option("--beam_width", min=1, help="Paths kept (beam), subtrees (dvts), leaves (mcts): 4.")
    ] = None,
    expand: Annotated[int | None, typer.Option("--expand", min=1, help="Samples of a path's next step: 4.")] = None,
    token_budget: Annotated[
        int | None, typer.Option("--token_budget", min=1, help="Most generated tokens of one search.")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max_steps", min=1, help="Steps after which a response is no longer branched.")
    ] = None,
    step_value: Annotated[
        str | None, typer.Option("--step_value", help="Ranks paths: last (step score), geometric, min, product, ...")
    ] = None,
    exploration: Annotated[
        float | None, typer.Option("--exploration", min=0, help="Weight of the unexplored (mcts): 1.0.")
    ] = None,
    total_parts: Annotated[
        int, typer.Option("--total_parts", min=1, help="Split the questions over processes.")
    ] = RunOptions.total_parts,
    part: Annotated[int, typer.Option("--part", min=0, help="Which part to run, from 0.")] = RunOptions.part,
    max_questions: Annotated[int | None, typer.Option("--max_questions", min=1, help="Only the first.")] = None,
    release: Annotated[
        str | None, typer.Option("--release", help="Of livecodebench: the problems of release_v1, ..., release_v6.")
    ] = None,
    start_date: Annotated[
        str | None, typer.Option("--start_date", help="Of livecodebench: contests from this day on, as YYYY-MM-DD.")
    ] = None,
    end_date: Annotated[str | None, typer.Option("--end_date", help="And up to this day, itself included.")] = None,
    request_timeout: RequestTimeout = RetryPolicy.request_timeout_s,
    patience: Annotated[
        float, typer.Option("--patience", min=0, help="Seconds to wait for an absent service.")
    ] = RetryPolicy.patience_s,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Generate and score responses to a benchmark."""
    from xbai.evaluate.run import run
    from xbai.search.strategy import SearchOptions

    search_options = SearchOptions(search, beam_width, expand, token_budget, max_steps, step_value, exploration)
    run(
        RunOptions(
            task=task,
            input_file=input_file,
            output_file=output_file,
            model_dir=model_dir,
            response_api_url=response_api_url,
            score_api_url=score_api_url,
            n_samples=n_samples,
            branch=branch_for(search_options, branch, effort),
            response_num=response_num,
            max_in_flight=max_in_flight,
            score_source=score_source,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            max_tokens=max_tokens,
            stop=tuple(stop or ()),
            seed=seed,
            total_parts=total_parts,
            part=part,
            max_questions=max_questions,
            selection={"release": release, "start_date": start_date, "end_date": end_date},
            search=search_options,
            retry=RetryPolicy(patience_s=patience, request_timeout_s=request_timeout),
            api_key=read_api_key(api_key, api_key_file),
        )
    )


CalibrationPath = Annotated[
    Path | None,
    typer.Option("--calibration", help="Model folder (or file) of xbai calibrate: choose by score and log-prob too."),
]
Task = Annotated[str, typer.Option("--task", help="The benchmark, which knows how its answers are graded.")]


@_command("metric")
def metric(
    task: Task,
    result_paths: Annotated[
        list[str], typer.Option("--result_paths", help="Result files of one run: a path or a glob; may be repeated.")
    ],
    more_paths: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="More of them, as a shell expands a glob.")
    ] = None,
    n: Annotated[int, typer.Option("--N", min=1, help="Candidates among which the score chooses.")] = 1,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Results to compare with, question by question; a glob; may be repeated."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here; - for the terminal, instead of the tables.")
    ] = None,
    markdown_path: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables here; - for the terminal, likewise.")
    ] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw the figure here: .png, .pdf or .svg.")] = None,
    calibration: CalibrationPath = None,
) -> None:
    """Grade results: pass@1 of Best-of-N over all disjoint groups of N, then every strategy at every N."""
    from xbai.evaluate.metric_command import MetricOptions, run_metric

    run_metric(
        MetricOptions(
            task=task,
            patterns=(*result_paths, *(more_paths or ())),
            n=n,
            base_patterns=tuple(compare or ()),
            json_path=json_path,
            markdown_path=markdown_path,
            plot_path=plot_path,
            calibration=calibration,
        )
    )


@_command("calibrate")
def calibrate(
    results: Annotated[
        list[str],
        typer.Argument(metavar="RESULTS", help="Results of validation questions, with scores and log-probs; globs."),
    ],
    task: Task,
    model_path: ModelPath,
) -> None:
    """Learn how to choose by score and log-prob together; writes sprm_calibration.json beside the model's head."""
    from xbai.evaluate.calibrate_command import run_calibrate

    run_calibrate(task, results, model_path)


@_command("plot")
def plot(
    kind: Annotated[str, typer.Argument(help="training.")],
    metrics_file: Annotated[Path, typer.Option("--metrics_file", help="metrics.jsonl of a training.")],
    output: Annotated[Path, typer.Option("--output", help="The figure to write: .png, .pdf or .svg.")],
) -> None:
    """Draw a training's curves; figures of results come from metric --plot and summary --plot."""
    from xbai.evaluate.training_plot import plot_training

    if kind != "training":
        raise UserError(f"plot {kind!r}: use training; metric --plot and summary --plot draw results")
    plot_training(metrics_file, output)
    typer.echo(f"wrote {output}")


@_command("summary")
def summary(
    task: Task,
    base_results: Annotated[str, typer.Option("--base_results", help="Results of the model before RL; a glob.")],
    rl_results: Annotated[str, typer.Option("--rl_results", help="Results of the model after RL; a glob.")],
    output: Annotated[Path, typer.Option("--output", help="The JSON file to write.")],
    held_out: Annotated[
        str | None,
        typer.Option("--held_out", help="Results of the model after RL on other kinds of questions."),
    ] = None,
    held_out_base: Annotated[
        str | None, typer.Option("--held_out_base", help="Results of the model before RL on those.")
    ] = None,
    calibration: CalibrationPath = None,
    score_setting: Annotated[
        Path | None, typer.Option("--score_setting", help="A JSON object that says how the score was trained.")
    ] = None,
    plot_output: Annotated[Path | None, typer.Option("--plot", help="Also draw accuracy against N here.")] = None,
    seconds_total: Annotated[
        float | None, typer.Option("--seconds_total", min=0, help="Time of the whole run.")
    ] = None,
) -> None:
    """Compare a model before and after RL."""
    from xbai.evaluate.summary_command import SummaryOptions, run_summary

    run_summary(
        SummaryOptions(
            task=task,
            base_results=base_results,
            rl_results=rl_results,
            output=output,
            held_out=held_out,
            held_out_base=held_out_base,
            calibration=calibration,
            score_setting=score_setting,
            plot_output=plot_output,
            seconds_total=seconds_total,
        )
    )


@_command("features")
def features(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE", help="Graded responses: result files, or a training's rollouts; globs, folders."
        ),
    ],
    model_path: ModelPath,
    output: Annotated[Path, typer.Option("--output", help="Folder for the features, a file for each of FILE.")],
    task: Annotated[str | None, typer.Option("--task", help="The benchmark by which result files are graded.")] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Decoder layers from 0, as 8,16,22; by default the one that a head reads."),
    ] = None,
    lang: Annotated[
        str | None, typer.Option("--lang", help="Step rule: en or zh; by default the one that travels with the model.")
    ] = None,
    dtype: Dtype = "auto",
    max_batch_tokens: Annotated[
        int | None, typer.Option("--max_batch_tokens", min=1, help="Most tokens of one forward pass.")
    ] = None,
) -> None:
    """Keep what a score head sees of graded responses, to train and compare heads without the model."""
    from xbai.evaluate.feature_files import FeatureFiles, FeatureOptions
    from xbai.evaluate.graded_responses import response_files

    options = FeatureOptions(
        model_path=model_path,
        task=task,
        layers=_numbers("--layers", layers),
        lang=lang,
        dtype=dtype,
        max_batch_tokens=max_batch_tokens,
    )
    paths = response_files(files)
    made = FeatureFiles(options, output)
    for path in paths:
        typer.echo(made.of(path))


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(map(int, text.split(",")))
    except ValueError:
        raise UserError(f"{option} {text}: whole numbers with commas between them") from None
