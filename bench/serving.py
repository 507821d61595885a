"""What judging costs: fused scores, a second pass, and both services under load, on random models.

    python bench/serving.py [--model tiny|0.5b|both] [--engine auto|vllm|hf] [--clients 1,8,32] [--out FILE]

Models: the tiny one, and one of the shape of Qwen2.5-0.5B; on a GPU the latter in bfloat16, else float32.

- generate: time of `Engine.generate` with fused scores (`return_scores=True`) over that of an engine without a score
  head, and of the latter with `Scorer.score` of the finished responses after it; and of fused scores with log-probs
  over those without. Two processes have an engine each and take turns. All ways generate the same tokens from the same
  seeds.
- score service: texts per second of `xbai serve-score` over those of `reference_score_service.py`, which passes one
  text after the other through the whole model, as public code does. Both run all the while, and take turns in rounds of
  the same texts.
- policy service: requests per second and latencies of `xbai serve-policy`, one response with scores a request.

Ratios are of medians, with a 95 % bootstrap interval over the turns. Memory is the peak of the service's process (and
what it took of the GPU) under the most clients. The last line is one JSON object, whose first three figures are those
of the largest model measured; `models` has everything.
"""

from __future__ import annotations

import importlib.util
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from engine_process import EngineProcess, Generated
from http_load import Load, ServiceProcess, press, running_service
from machine import ROOT, describe_machine, report, rounded
from rich.console import Console
from rich.table import Table
from serving_models import MODELS, Sizes, default_sizes, random_prompt_ids, random_text, write_model
from turns import Ratio, take_turns

from xbai.aggregation import aggregate
from xbai.engine import SamplingParams
from xbai.engine.files import quiet_transformers, read_config, resolve_dtype
from xbai.errors import UserError, exit_on_user_error

WARM_UPS = 1
SCORE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
STARTED = time.monotonic()


@dataclass(frozen=True)
class Subject:
    """A model to measure, by which engine, at which sizes and numbers of clients."""

    name: str
    folder: Path
    engine: str
    sizes: Sizes
    clients: tuple[int, ...]

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its response."""
        return self.sizes.prompt_tokens + self.sizes.response_tokens

    @property
    def tolerance(self) -> float:
        """How far two ways to compute a score may be apart."""
        return SCORE_TOLERANCE[resolve_dtype("auto", read_config(self.folder))]

    def script(self, name: str, *options: object) -> list[str]:
        """The command line of a service of this model."""
        return [sys.executable, str(ROOT / name), "--model_path", str(self.folder), *map(str, options)]

    def log(self, name: str) -> Path:
        """Where a service's log goes."""
        return self.folder.parent / f"{name}.log"


def say(text: str) -> None:
    """Progress, on standard error."""
    typer.echo(f"[{time.monotonic() - STARTED:4.0f} s] {text}", err=True)


def measure_engine(subject: Subject) -> dict[str, Any]:
    """Generation alone, with fused scores and with a second pass."""
    sizes = subject.sizes
    options: dict[str, Any] = {"max_model_len": subject.max_model_len, "max_num_seqs": sizes.prompts}
    if subject.engine == "vllm":
        # The same prompts come again and again, and are to be computed every time.
        options |= {"enable_prefix_caching": False, "kv_cache_memory_bytes": _cache_bytes(subject)}
    prompts = random_prompt_ids(read_config(subject.folder).vocab_size, sizes.prompts, sizes.prompt_tokens)
    each = [
        SamplingParams(max_tokens=sizes.response_tokens, ignore_eos=True, seed=seed) for seed in range(len(prompts))
    ]
    with_log_probs = [replace(params, log_probs=True) for params in each]
    with (
        EngineProcess(subject.engine, subject.folder, with_head=False, options=options) as plain,
        EngineProcess(subject.engine, subject.folder, with_head=True, options=options) as fused,
    ):
        difference = _largest_difference(prompts, fused.generate(prompts, each, fused_scores=True), plain)
        _check_scores(subject, difference)
        arms = {
            "plain": lambda: plain.generate(prompts, each).seconds,
            "fused": lambda: fused.generate(prompts, each, fused_scores=True).seconds,
            "fused_log_probs": lambda: fused.generate(prompts, with_log_probs, fused_scores=True).seconds,
            "second_pass": lambda: plain.generate(prompts, each, second_pass=True).seconds,
        }
        seconds = take_turns(arms, sizes.repeats, WARM_UPS)
    found = {
        "tokens": sizes.prompts * sizes.response_tokens,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "largest_score_difference": difference,
    }
    bases = {"fused": "plain", "fused_log_probs": "fused", "second_pass": "plain"}
    ratios = {name: Ratio.of(seconds[name], seconds[base]) for name, base in bases.items()}
    over = {name: f"{ratio} over {bases[name]}" for name, ratio in ratios.items()}
    rows = [[name, f"{found['seconds'][name]:.3f}", over.get(name, "")] for name in seconds]
    show(f"{subject.name}: {found['tokens']} tokens by {subject.engine}", ["generate", "seconds", "ratio"], rows)
    return found | {f"{name}_over_{bases[name]}": asdict(ratio) for name, ratio in ratios.items()}


def _cache_bytes(subject: Subject) -> int:
    """KV cache of all sequences at once, in blocks of at most 128 tokens, twice."""
    config = read_config(subject.folder)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = resolve_dtype("auto", config).itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize
    return 2 * subject.sizes.prompts * (subject.max_model_len + 128) * token


def _largest_difference(prompts: list[list[int]], generated: Generated, scoring: EngineProcess) -> float:
    sequences = [prompt + one.token_ids for prompt, one in zip(prompts, generated.completions, strict=True)]
    values = scoring.score(sequences, list(map(len, prompts)))
    fused = [aggregate(one.step_scores) for one in generated.completions]
    if not any(fused):
        raise RuntimeError("no response has a step, so that nothing is scored; generate more tokens")
    return max(abs(one - other) for one, other in zip(fused, values, strict=True))


def _check_scores(subject: Subject, difference: float) -> None:
    """Two ways that do not give the same are not to be compared."""
    if difference > subject.tolerance:
        raise RuntimeError(
            f"{subject.name}: the scores differ by {difference:.2g}, at most {subject.tolerance:g} is right"
        )


def measure_score_service(subject: Subject) -> dict[str, Any]:
    """Texts per second and memory of the score service and of the reference."""
    rng = random.Random(0)
    most = _whole_turns(subject.sizes.texts, max(subject.clients))
    bodies = [{"text": random_text(rng, rng.randint(*subject.sizes.text_tokens))} for _ in range(most)]
    commands = {
        "service": subject.script("test/score_model_queue.py"),
        "reference": subject.script("bench/reference_score_service.py"),
    }
    services: dict[str, ServiceProcess] = {}
    answers, memory = {}, {}
    with ExitStack() as stack:
        for name, command in commands.items():
            services[name] = stack.enter_context(running_service(command, subject.log(name)))
            answers[name] = press(f"{services[name].url}/score", bodies, max(subject.clients)).answers
            memory[name] = services[name].peak_memory_mib()
        pairs = zip(answers["service"], answers["reference"], strict=True)
        difference = max(abs(one["value"] - other["value"]) for one, other in pairs)
        _check_scores(subject, difference)
        by_clients = {clients: _score_rounds(subject, services, bodies, clients) for clients in subject.clients}
    rows = [
        [str(clients), *(f"{figures[name]['texts_per_s']:.2f}" for name in commands), str(Ratio(**figures["ratio"]))]
        for clients, figures in by_clients.items()
    ]
    rows += [
        ["peak MiB", *(" + ".join(f"{size} {kind}" for kind, size in memory[name].items()) for name in commands), ""]
    ]
    show(f"{subject.name}: texts/s to score", ["clients", "service", "reference", "over reference"], rows)
    return {"clients": by_clients, "peak_memory_mib": memory, "largest_score_difference": difference}


def _score_rounds(
    subject: Subject, services: dict[str, ServiceProcess], bodies: list[dict[str, Any]], clients: int
) -> dict[str, Any]:
    round_of = bodies[: _whole_turns(subject.sizes.texts, clients)]
    loads: dict[str, list[Load]] = {name: [] for name in services}

    def one_round(name: str) -> float:
        loads[name].append(press(f"{services[name].url}/score", round_of, clients))
        return loads[name][-1].per_second

    arms = {name: lambda name=name: one_round(name) for name in services}
    rates = take_turns(arms, subject.sizes.rounds, warm_ups=0)
    say(f"{subject.name}: scored by {clients} clients, {subject.sizes.rounds} rounds of {len(round_of)} texts")
    figures: dict[str, Any] = {
        name: {
            "texts_per_s": statistics.median(values),
            "p50_s": statistics.median(load.quantile(0.5) for load in loads[name]),
            "p99_s": statistics.median(load.quantile(0.99) for load in loads[name]),
        }
        for name, values in rates.items()
    }
    return figures | {"texts": len(round_of), "ratio": asdict(Ratio.of(rates["service"], rates["reference"]))}


def measure_policy_service(subject: Subject) -> dict[str, Any]:
    """Requests per second and latencies of the policy service."""
    sizes, rng = subject.sizes, random.Random(0)
    most = 2 * _whole_turns(sizes.requests, max(subject.clients))
    bodies = [
        {
            "prefix_prompt": random_text(rng, sizes.prompt_tokens),
            "max_tokens": sizes.response_tokens,
            "response_num": 1,
            "seed": seed,
            "return_scores": True,
        }
        for seed in range(most)
    ]
    options = ("--engine", subject.engine, "--max_model_len", subject.max_model_len)
    by_clients = {}
    with running_service(subject.script("test/policy_model_queue.py", *options), subject.log("policy")) as service:
        url = f"{service.url}/generate"
        press(url, bodies[-max(subject.clients) :], max(subject.clients))
        for clients in subject.clients:
            load = press(url, bodies[: _whole_turns(max(sizes.requests, 2 * clients), clients)], clients)
            by_clients[clients] = {
                "requests": len(load.answers),
                "requests_per_s": load.per_second,
                "tokens_per_s": sum(sum(answer["token_counts"]) for answer in load.answers) / load.seconds,
                "p50_s": load.quantile(0.5),
                "p99_s": load.quantile(0.99),
            }
            say(f"{subject.name}: {len(load.answers)} requests of {clients} clients answered")
        memory = service.peak_memory_mib()
    names = ["requests", "requests_per_s", "tokens_per_s", "p50_s", "p99_s"]
    rows = [[str(clients), *(f"{figures[name]:.4g}" for name in names)] for clients, figures in by_clients.items()]
    show(f"{subject.name}: responses by the {subject.engine} engine", ["clients", *names], rows)
    return {"clients": by_clients, "peak_memory_mib": memory}


def _whole_turns(least: int, clients: int) -> int:
    """So many requests that every client has the same number."""
    return -(-least // clients) * clients


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def measure(subject: Subject) -> dict[str, Any]:
    """Everything of one model."""
    figures: dict[str, Any] = {"sizes": asdict(subject.sizes), "engine": subject.engine}
    for title, part in (
        ("generate", measure_engine),
        ("score_service", measure_score_service),
        ("policy_service", measure_policy_service),
    ):
        say(f"{subject.name}: {title.replace('_', ' ')}")
        figures[title] = part(subject)
    return figures


def summary(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The ratios of the last model, and all figures of all."""
    last = list(models.values())[-1]
    by_clients = last["score_service"]["clients"]
    return {
        "benchmark": "serving",
        "fused_over_plain": last["generate"]["fused_over_plain"]["ratio"],
        "second_pass_over_plain": last["generate"]["second_pass_over_plain"]["ratio"],
        "score_service_over_reference": {clients: figures["ratio"]["ratio"] for clients, figures in by_clients.items()},
        "models": models,
    }


def _engine_name(engine: str) -> str:
    if engine not in ("auto", "vllm", "hf"):
        raise UserError(f"--engine {engine} is unknown, use vllm, hf or auto")
    has_vllm = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not has_vllm:
        raise UserError("--engine vllm: vLLM is not installed; install it, or use hf")
    return ("vllm" if has_vllm else "hf") if engine == "auto" else engine


def _client_counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise UserError(f"--clients {text}: numbers from 1, as in 1,8,32")
    return counts


def _text_tokens(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    shortest, _, longest = text.partition("-")
    if not (shortest.isdecimal() and longest.isdecimal() and 32 <= int(shortest) <= int(longest) <= 1024):
        raise UserError(f"--text-tokens {text}: shortest and longest, from 32 to 1024, as in 200-600")
    return int(shortest), int(longest)


@exit_on_user_error
def main(
    model: Annotated[str, typer.Option(help="tiny, 0.5b or both")] = "both",
    engine: Annotated[str, typer.Option(help="vllm, hf, or auto: vllm where it is installed")] = "auto",
    clients: Annotated[str, typer.Option(help="of the services, one number after the other")] = "1,8,32",
    prompts: Annotated[int | None, typer.Option(min=1, help="of a call of generate, a response each")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=16)] = None,
    response_tokens: Annotated[int | None, typer.Option(min=16)] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="turns of the ways to generate")] = None,
    text_tokens: Annotated[str | None, typer.Option(help="shortest and longest text to score, as in 200-600")] = None,
    texts: Annotated[int | None, typer.Option(min=1, help="least of a round")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="turns of score service and reference")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="least to the policy service")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; bench/results/serving_{cpu or gpu}.json")] = None,
) -> None:
    """Measure every model and write the figures."""
    if model not in (*MODELS, "both"):
        raise UserError(f"--model {model} is unknown, use one of {', '.join(MODELS)}, both")
    given = {
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "repeats": repeats,
        "text_tokens": _text_tokens(text_tokens),
        "texts": texts,
        "rounds": rounds,
        "requests": requests,
    }
    given = {name: value for name, value in given.items() if value is not None}
    chosen_engine, counts = _engine_name(engine), _client_counts(clients)
    out = out or ROOT / f"bench/results/serving_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    # As an exception, so that no service outlives its benchmark.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    say(f"the figures go to {out}")
    models: dict[str, dict[str, Any]] = {}
    with quiet_transformers():
        for name in MODELS if model == "both" else (model,):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "model"
                say(f"{name}: writing a random model")
                write_model(name, folder)
                models[name] = measure(
                    Subject(name, folder, chosen_engine, replace(default_sizes(name), **given), counts)
                )
    report(rounded(summary(models)) | {"machine": describe_machine()}, out)


if __name__ == "__main__":
    typer.run(main)
