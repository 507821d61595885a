"""Tokens per second of every phase of a training step: rollout, weight sync, log-probs and the joint update.

    python bench/train_step.py [--models tiny,1.5b] [--engines hf,vllm] [--repeats 3] [--quickstart FOLDER] [--out FILE]

The trainer's own actor, packed and padded, on one process and without Ray: it needs torch and transformers only (and
vLLM for `--engines vllm`). Weights are random; `1.5b` is DeepSeek-R1-Distill-Qwen-1.5B cut to two layers, with its
whole vocabulary. Rows have responses of a quarter to all of `--response-tokens`, so that there is padding to leave out;
tokens are counted without it. A time is the median of `--repeats` runs after `--warm-ups`. The last line is one JSON
object.

With `--quickstart`, the folder of a finished one, also a run of `main_ppo` on its base: seconds of a step, and the
share of them that no phase of its workers has (driver, Ray, Python), which needs all that the trainer needs.

On a GPU the policy computes in bfloat16, and there is also, for log-probs and update, the peak memory and the MFU:
floating-point operations that the model asks for, 2 a matrix element and token (LM head: response tokens only) and
4 x query width x context in attention, three times that in an update (recomputation does not count), over the seconds
and the GPU's peak (`verl.utils.device_peaks`).
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import ROOT, describe_machine, report, rounded
from short_run import ShortRun, outside_share

from verl.bringup import workload
from verl.models.fsdp import local_device, named_full_tensors
from verl.trainer.planning.model_shapes import ModelShape, config_of
from verl.utils.device_peaks import peak_tflops
from xbai.benchmarks.tiny_model import write_tiny_model
from xbai.engine import SamplingParams, load_engine
from xbai.engine.files import quiet_transformers
from xbai.errors import UserError, exit_on_user_error

GIB = 2**30
MODELS = ("tiny", "1.5b")
ENGINES = ("hf", "vllm")
LAYOUTS = {"padded": False, "packed": True}
CUT_LAYERS = 2


@dataclass(frozen=True)
class Sizes(workload.Sizes):
    """Rows of the batch and their lengths, and how often everything runs."""

    warm_ups: int
    repeats: int


def default_sizes(model: str, on_gpu: bool) -> dict[str, int]:
    """Sizes that a machine of the kind gets through in a few minutes."""
    if on_gpu:
        sizes = (32, 8, 256, 2048, 32768) if model == "1.5b" else (32, 8, 64, 512, 32768)
    else:
        sizes = (2, 2, 32, 128, 512) if model == "1.5b" else (8, 4, 32, 256, 4096)
    names = ("prompts", "samples", "prompt_tokens", "response_tokens", "tokens_per_micro_batch")
    return dict(zip(names, sizes))


def write_model(name: str, folder: Path) -> None:
    """A model of random weights with a tokenizer, whose ids are all within the vocabulary."""
    if name == "tiny":
        write_tiny_model(folder)
    else:
        workload.write_model(folder, workload.SHAPE, CUT_LAYERS)


def measure(run: Callable[[], Any], sizes: Sizes) -> dict[str, float]:
    """Median seconds, and on a GPU the peak memory."""
    seconds = []
    for _ in range(sizes.warm_ups):
        run()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(sizes.repeats):
        started = _now()
        run()
        seconds.append(_now() - started)
    found = {"seconds": statistics.median(seconds)}
    if torch.cuda.is_available():
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_engine(name: str, folder: Path, sizes: Sizes, parameters: int) -> dict[str, Any]:
    """Rollout, in which every response has all its tokens, and sync of the policy's weights, of one engine."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    policy = workload.build_policy(folder, workload.fsdp_section())
    engine = load_engine(
        name,
        folder,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=sizes.prompt_tokens + sizes.response_tokens,
        with_scores=False,
        max_num_seqs=sizes.rows,
    )
    prompts = torch.randint(len(engine.tokenizer), (sizes.prompts, sizes.prompt_tokens)).tolist()
    sampling = SamplingParams(n=sizes.samples, max_tokens=sizes.response_tokens, ignore_eos=True, log_probs=True)
    rollout = measure(lambda: engine.generate(prompts, sampling), sizes)
    tokens = sizes.rows * sizes.response_tokens
    sync = measure(lambda: engine.update_weights(named_full_tensors(policy.model, dtype)), sizes)
    size = parameters * dtype.itemsize
    engine.close()
    return {
        "rollout": rollout | {"tokens": tokens, "tokens_per_s": tokens / rollout["seconds"]},
        "weight_sync": sync | {"gib": size / GIB, "gib_per_s": size / GIB / sync["seconds"]},
    }


def measure_training(folder: Path, sizes: Sizes, packed: bool, shape: ModelShape) -> dict[str, Any]:
    """Log-probs and the update of one layout."""
    policy = workload.build_policy(folder, workload.fsdp_section(), packed=packed, gradient_checkpointing=True)
    actor, batch = workload.build_actor(policy, folder, sizes, packed)
    batch |= actor.compute_log_prob(batch)
    batch["ref_log_prob"] = batch["old_log_probs"]
    lengths = batch["attention_mask"].sum(1).tolist()
    tokens, flops = sum(lengths), shape.sequence_flops(lengths, int(batch["response_mask"].sum()))
    phases = {
        "log_prob": (lambda: actor.compute_log_prob(batch), flops),
        "update": (lambda: actor.update_policy(batch), 3 * flops),
    }
    found = {}
    for name, (run, needed) in phases.items():
        cost = measure(run, sizes)
        found[name] = cost | {"tokens": tokens, "tokens_per_s": tokens / cost["seconds"]} | mfu(needed, cost["seconds"])
    return found


def mfu(flops: float, seconds: float) -> dict[str, float]:
    """Model flops utilisation, where there is a GPU of a known peak."""
    per_second = {"tflops_per_s": flops / seconds / 1e12}
    if not torch.cuda.is_available():
        return per_second
    peak = peak_tflops(torch.cuda.get_device_name(), torch.bfloat16)
    return per_second if peak is None else per_second | {"mfu": per_second["tflops_per_s"] / peak}


def measure_run(run: ShortRun) -> dict[str, float]:
    """Medians over the steps of a run of the whole trainer."""
    rows = run.run(seed=0)
    seconds = statistics.median(row["timing_s/step"] for row in rows)
    return {"seconds": seconds, "outside_share": statistics.median(map(outside_share, rows))}


def _chosen(names: str, known: tuple[str, ...], option: str) -> list[str]:
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"{option} {unknown[0]} is unknown, use some of {','.join(known)}")
    return chosen


@exit_on_user_error
def main(
    models: Annotated[str, typer.Option(help=f"some of {','.join(MODELS)}")] = ",".join(MODELS),
    engines: Annotated[str | None, typer.Option(help="some of hf,vllm; without it those that are installed")] = None,
    prompts: Annotated[int | None, typer.Option(min=1)] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="responses of a prompt")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    response_tokens: Annotated[int | None, typer.Option(min=4)] = None,
    tokens_per_micro_batch: Annotated[int | None, typer.Option(min=1)] = None,
    warm_ups: Annotated[int, typer.Option(min=0)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    quickstart: Annotated[Path | None, typer.Option(help="also a run on the base of a finished quickstart")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; bench/results/train_step_{cpu or gpu}.json")] = None,
) -> None:
    """Measure every model and write the figures."""
    run = None if quickstart is None else ShortRun(quickstart, max(repeats, 2), torch.get_num_threads())
    if run is not None:
        run.check()
    on_gpu = torch.cuda.is_available()
    installed = ["hf"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
    chosen_engines = installed if engines is None else _chosen(engines, ENGINES, "--engines")
    given = {
        "prompts": prompts,
        "samples": samples,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "tokens_per_micro_batch": tokens_per_micro_batch,
    }
    given = {name: value for name, value in given.items() if value is not None}
    result: dict[str, Any] = {"benchmark": "train_step", "compute_dtype": "bfloat16" if on_gpu else "float32"}
    with workload.process_group(), quiet_transformers(), tempfile.TemporaryDirectory() as temporary:
        for name in _chosen(models, MODELS, "--models"):
            sizes = Sizes(**default_sizes(name, on_gpu) | given, warm_ups=warm_ups, repeats=repeats)
            folder = Path(temporary) / name
            write_model(name, folder)
            shape = ModelShape.from_config(config_of(folder))
            figures: dict[str, Any] = {"parameters": shape.parameters, "layers": shape.layers, "sizes": asdict(sizes)}
            for layout, packed in LAYOUTS.items():
                figures[layout] = measure_training(folder, sizes, packed, shape)
                gc.collect()
            figures["engines"] = {}
            for engine in chosen_engines:
                figures["engines"][engine] = measure_engine(engine, folder, sizes, shape.parameters)
                gc.collect()
            result[name] = figures
    if run is not None:
        result["run"] = measure_run(run)
    default = ROOT / f"bench/results/train_step_{local_device().type.replace('cuda', 'gpu')}.json"
    report(rounded(result) | {"machine": describe_machine()}, out or default)


if __name__ == "__main__":
    typer.run(main)
