"""What pruned samples leave behind in vLLM's engine: nothing, it is hoped.

    OMP_NUM_THREADS=1 python bench/pruned_samples.py [--samples 10000] [--out FILE]

Samples of a tiny random model are given up after a few tokens, again and again; in between one request is written to
its end. The last line is one JSON object: how many were pruned, `requests_left` and `blocks_lost` by the scheduler, and
by how many MiB the process grew over the second half of them (in the first, the system gives the cache its memory).
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import psutil
import typer
from load import write_model
from machine import ROOT, describe_machine, report

from xbai.engine import Engine, SamplingParams, load_engine

AT_ONCE, TOKENS = 125, 4
PROMPT = [1, 2, 3]
PARAMS = SamplingParams(n=AT_ONCE, max_tokens=100, log_probs=True, ignore_eos=True)


def prune(engine: Engine, seed: int) -> None:
    """Begin `AT_ONCE` samples, look at their scores, and give them up."""
    samples = engine.samples([*PROMPT, seed % engine.vocab_size], replace(PARAMS, seed=seed), return_scores=True)
    for sample in samples:
        engine.add(sample)
    for _ in range(TOKENS):
        engine.step()
    engine.with_new_step(samples)
    engine.so_far(samples)
    engine.abort(samples)


def main(
    samples: Annotated[int, typer.Option(min=2 * AT_ONCE, help="to prune")] = 10_000,
    out: Annotated[Path, typer.Option(help="the JSON file to write")] = ROOT / "bench/results/pruned_samples.json",
) -> None:
    """Prune them and count what is left."""
    with tempfile.TemporaryDirectory() as folder:
        engine = load_engine("vllm", write_model(Path(folder) / "model"), with_scores=True)
        core = engine._llm.engine_core.engine_core
        blocks = core.scheduler.kv_cache_manager.block_pool
        free, memory = [], []
        for half in range(2):
            for seed in range(samples // 2 // AT_ONCE):
                prune(engine, 2 * seed + half)
            engine.generate([PROMPT], replace(PARAMS, n=1))
            gc.collect()
            free.append(blocks.get_num_free_blocks())
            memory.append(psutil.Process().memory_info().rss)
        left = [core.scheduler.requests, engine._llm.output_processor.request_states, engine._states, engine._seen]
        result = {
            "pruned": 2 * (samples // 2 // AT_ONCE) * AT_ONCE,
            "requests_left": sum(map(len, left)),
            "blocks_lost": free[0] - free[1],
            "growth_mib": round((memory[1] - memory[0]) / 2**20, 1),
            "machine": describe_machine(),
        }
        engine.close()
    report(result, out)


if __name__ == "__main__":
    typer.run(main)
