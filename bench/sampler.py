"""What penalties and seeds add to a step's sampling, by vLLM's own sampler and by the engine's, late in long answers.

    python bench/sampler.py [--rows 256] [--tokens 16384] [--vocabulary 151936] [--repeats 5] [--out FILE]

A step is what a model runner does between two passes of the model, with lists and batch as in asynchronous scheduling:
the batch's metadata, the tokens of the step before into the lists that want them, the sampler. The logits are random
and ready. Ways and cases (plain, penalties, seeds, both) take turns in one process; figures are medians, ratios have
95 % bootstrap intervals. Three settings of the arithmetic, and what is left without it:

- `top_p`: nucleus sampling of 0.95, the services' default; `all`: no filter. PyTorch's operations, as a GPU runs them
  where it has no FlashInfer.
- `cpu`: no filter, by the fused kernel that vLLM has for CPUs alone.
- `host`: as `all` with a vocabulary of 512. The arithmetic is next to nothing: the time is Python's and that of lists
  becoming tensors, which a GPU would wait for.

The last line is one JSON object; `both_over_plain` is the engine's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from machine import ROOT, describe_machine, report, rounded
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from turns import Ratio, take_turns

from xbai.errors import exit_on_user_error

HOST_VOCABULARY = 512
PENALTY, TOP_P, PROMPT_TOKENS = 1.05, 0.95, 128
CASES = {"plain": (False, False), "penalties": (True, False), "seeds": (False, True), "both": (True, True)}
WAYS = ("vllm", "engine")


@dataclass(frozen=True)
class Setting:
    """The arithmetic of a step."""

    vocabulary: int
    top_p: float = 1.0
    fused: bool = False


class Event:
    """Stands in for a CUDA event: the tokens are there."""

    def synchronize(self) -> None:
        """Wait for nothing."""


class Stage:
    """A batch of vLLM's in the midst of its answers, and one of the samplers.

    Args:
        way: whose sampler.
        penalties: every request has one.
        seeds: every request has one.
        setting: the arithmetic.
        prompts: [rows][tokens].
        outputs: [rows][tokens], which the steps go on with.
    """

    def __init__(
        self,
        way: str,
        penalties: bool,
        seeds: bool,
        setting: Setting,
        prompts: list[list[int]],
        outputs: list[list[int]],
    ) -> None:
        from vllm import SamplingParams
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

        rows, length = len(outputs), len(prompts[0]) + len(outputs[0])
        self._batch = InputBatch(
            rows,
            length,
            length,
            torch.device("cpu"),
            setting.vocabulary,
            block_sizes=[length],
            max_num_blocks_per_req=[1],
        )
        self._sampler = Sampler() if way == "vllm" else self._engine_sampler(rows)
        of_vllm = self._sampler.topk_topp_sampler if way == "vllm" else self._sampler.topk_topp_sampler._unseeded
        of_vllm.forward = of_vllm.forward_cpu if setting.fused else of_vllm.forward_native
        self._requests = []
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            options = {"repetition_penalty": PENALTY if penalties else 1.0, "seed": row if seeds else None}
            params = SamplingParams(top_p=setting.top_p, **(options if way == "vllm" else {"extra_args": options}))
            generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
            request = CachedRequestState(f"{row}", prompt, [], params, generator, ([0],), 0, list(output))
            self._requests.append(request)
            self._batch.add_request(request)

    def _engine_sampler(self, rows: int) -> nn.Module:
        from xbai.engine.vllm.rows import BatchRows
        from xbai.engine.vllm.sampler import EngineSampler

        runner = SimpleNamespace(
            device=self._batch.device,
            max_num_reqs=rows,
            input_batch=self._batch,
            discard_request_mask=SimpleNamespace(gpu=torch.zeros(rows, dtype=torch.bool)),
        )
        batch_rows = BatchRows(runner)
        self._batch.logitsprocs.non_argmax_invariant.append(batch_rows)
        return EngineSampler(nn.Module(), False, batch_rows)

    def step(self, logits: Tensor) -> float:
        """Milliseconds of a step; logits [rows, vocabulary] are not changed."""
        logits = logits.clone()
        started = time.perf_counter()
        batch = self._batch
        batch.refresh_metadata()
        batch.update_async_output_token_ids()
        output = self._sampler(logits, batch.sampling_metadata)
        batch.prev_req_id_to_index = dict(batch.req_id_to_index)
        batch.set_async_sampled_token_ids(output.sampled_token_ids, Event())
        for request in self._requests:
            request.output_token_ids.append(-1)
        return 1000 * (time.perf_counter() - started)


@contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone, which the engine's sampler asks for."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    try:
        yield
    finally:
        parallel_state.cleanup_dist_env_and_memory()


def measure(setting: Setting, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Figures of all ways and cases."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, setting.vocabulary, generator=generator)
    prompts, outputs = (
        torch.randint(setting.vocabulary, (rows, length), generator=generator).tolist()
        for length in (PROMPT_TOKENS, tokens)
    )
    stages = {
        f"{way} {case}": Stage(way, *CASES[case], setting, prompts, outputs) for way, case in product(WAYS, CASES)
    }
    arms = {name: partial(stage.step, logits) for name, stage in stages.items()}
    figures = take_turns(arms, repeats, warm_ups=1)
    result: dict[str, Any] = {**asdict(setting)}
    for way in WAYS:
        plain = figures[f"{way} plain"]
        result[way] = {f"{case}_ms": statistics.median(figures[f"{way} {case}"]) for case in CASES}
        result[way]["both_over_plain"] = asdict(Ratio.of(figures[f"{way} both"], plain))
    return result


def show(settings: dict[str, dict[str, Any]]) -> None:
    """A table of the medians."""
    table = Table("setting", "sampler", *(f"{case} ms" for case in CASES), "ratio")
    for name, way in product(settings, WAYS):
        found = settings[name][way]
        times = (f"{found[f'{case}_ms']:.1f}" for case in CASES)
        table.add_row(name, way, *times, f"{found['both_over_plain']['ratio']:.2f}")
    Console(stderr=True).print(table)


@exit_on_user_error
def main(
    rows: Annotated[int, typer.Option(min=1)] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="of output that each row has")] = 16384,
    vocabulary: Annotated[int, typer.Option(min=2)] = 151936,
    repeats: Annotated[int, typer.Option(min=2, help="steps of each way and case")] = 5,
    out: Annotated[Path, typer.Option(help="JSON file")] = ROOT / "bench/results/sampler.json",
) -> None:
    """Measure all settings."""
    settings = {
        "top_p": Setting(vocabulary, TOP_P),
        "all": Setting(vocabulary),
        "cpu": Setting(vocabulary, fused=True),
        "host": Setting(HOST_VOCABULARY),
    }
    with process_group(), torch.inference_mode():
        found = {name: measure(setting, rows, tokens, repeats) for name, setting in settings.items()}
    show(found)
    result = {
        "benchmark": "sampler",
        "both_over_plain": {name: one["engine"]["both_over_plain"]["ratio"] for name, one in found.items()},
        "rows": rows,
        "tokens": tokens,
        "repeats": repeats,
        "settings": found,
        "machine": describe_machine(),
    }
    report(rounded(result), out)


if __name__ == "__main__":
    typer.run(main)
