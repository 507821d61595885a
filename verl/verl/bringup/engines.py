"""vLLM on one GPU: what it samples, scores and says of its tokens, its sleep, its speed and its end."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from transformers import PreTrainedModel

from verl.bringup.generation import token_ids, token_log_probs
from verl.bringup.step import GIB, Context, require, seconds, step
from verl.bringup.workload import build_policy, fsdp_section, model_folder, plain_model, process_group
from verl.models.fsdp import named_full_tensors
from xbai.aggregation import aggregate
from xbai.engine import Completion, Engine, Sample, SamplingParams, Scorer, load_engine

TEMPERATURE = 0.8
EXACT_ERROR = 1e-4
SCORE_ERROR, LOG_PROB_ERROR = 0.01, 0.03
SLOWER = 1.3
MEASURED_STEPS = 40
MEANS = "vLLM's tokens come with scores or log-probs that are not the model's. "


@step(
    means=MEANS + "In float32 and without graphs, where nothing rounds: xbai/engine/vllm/fused_models.py.",
    needs=["vllm"],
)
def vllm_exact(context: Context) -> str:
    """Float32, eager: scores and log-probs those of the plain model."""
    with closing(_engine(context, dtype="float32", enforce_eager=True)) as engine:
        return _compare(context, engine, EXACT_ERROR, EXACT_ERROR)


@step(
    means=MEANS
    + "In bfloat16, on a GPU with graphs and asynchronous scheduling: enforce_eager=true avoids the graphs.",
    needs=["vllm"],
    limit_s=400,
)
def vllm_graphs(context: Context) -> str:
    """Bfloat16 as it serves: scores within 0.01, log-probs within 0.03 on average of float32."""
    with closing(_engine(context)) as engine:
        return _compare(context, engine, SCORE_ERROR, LOG_PROB_ERROR)


@step(
    means="A sleeping engine keeps the GPU's memory, or generates something else afterwards: rollout.sleep_level=1 "
    "keeps the weights in CPU memory, rollout.free_cache_engine=false lets it not sleep at all.",
    needs=["vllm"],
    limit_s=400,
)
def vllm_sleep(context: Context) -> str:
    """Levels 1 and 2, with the trainer's weights sent again and their checksums: the same greedy tokens."""
    folder, freed = model_folder(context), []
    greedy = SamplingParams(n=2, max_tokens=_tokens(context), temperature=0.0, ignore_eos=True)
    with process_group():
        policy = build_policy(folder, fsdp_section(param_offload=True, compute_dtype="bfloat16"))
        with closing(_engine(context)) as engine:
            before = token_ids(engine, _prompts(8), greedy)
            for level in (1, 2):
                held = torch.cuda.mem_get_info()[0] if context.on_gpu else 0
                engine.sleep(level)
                freed.append((torch.cuda.mem_get_info()[0] - held) / GIB if context.on_gpu else 0.0)
                engine.wake_up(["weights"])
                if level == 2:
                    with policy.on_device():
                        engine.update_weights(named_full_tensors(policy.model, torch.bfloat16), check=True)
                engine.wake_up(["kv_cache"])
                after = token_ids(engine, _prompts(8), greedy)
                require(after == before, f"greedy tokens changed after sleep level {level}")
    if not context.on_gpu:
        return "the same greedy tokens; checksums agree (a CPU engine does not sleep)"
    require(min(freed) > 1.0, f"sleep freed {freed[0]:.1f} GiB at level 1, {freed[1]:.1f} at level 2")
    return f"the same greedy tokens; checksums agree; {freed[0]:.1f} and {freed[1]:.1f} GiB freed"


@step(
    means="Requests with a seed or a repetition penalty, as evaluation sends them, make every step of vLLM slower than "
    "plain ones by more than 1.3 times: xbai/engine/vllm/sampler.py. Long answers will end in time-outs.",
    needs=["vllm"],
    limit_s=900,
)
def vllm_penalties_and_seeds(context: Context) -> str:
    """Milliseconds a step of 256 rows of 4,000 tokens: plain, seeded, penalised."""
    rows, length = (256, 4000) if context.on_gpu else (8, 40)
    with closing(_engine(context, layers=None)) as engine:
        _milliseconds(engine, rows, 1)
        found = {
            "plain": _milliseconds(engine, rows, length),
            "seeded": _milliseconds(engine, rows, length, seed=1),
            "penalised": _milliseconds(engine, rows, length, repetition_penalty=1.05),
        }
    figure = f"{rows} x {length}: " + ", ".join(f"{name} {each:.2f} ms" for name, each in found.items())
    if context.on_gpu:
        require(max(found.values()) <= SLOWER * found["plain"], f"{figure}; at most {SLOWER} x plain is wanted")
    return figure


@step(
    means="A closed engine keeps memory or process groups: no second engine can start in its process (bench and tests "
    "do that; the services start processes of their own).",
    needs=["vllm"],
    limit_s=400,
)
def vllm_closed(context: Context) -> str:
    """A second engine in the process, which then has the memory back."""
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    free = torch.cuda.mem_get_info()[0] if context.on_gpu else 0
    found = []
    for _ in range(2):
        with closing(_engine(context)) as engine:
            found.append(token_ids(engine, _prompts(8), greedy))
        gc.collect()
    require(found[0] == found[1], "the second engine generates something else")
    if not context.on_gpu:
        return "two engines, one after the other"
    torch.cuda.empty_cache()
    held = (free - torch.cuda.mem_get_info()[0]) / GIB
    require(held < 4, f"{held:.1f} GiB more are in use after two engines were closed")
    return f"two engines, one after the other; {held:.1f} GiB more in use afterwards"


def _engine(context: Context, layers: int | None = 4, dtype: str = "bfloat16", **options: Any) -> Engine:
    if context.on_gpu:
        options |= {"max_model_len": 8192, "max_num_seqs": 256, "gpu_memory_utilization": 0.6}
    else:
        options |= {"max_model_len": 256, "max_num_seqs": 16}
    return load_engine("vllm", model_folder(context, layers), dtype=dtype, with_scores=True, **options)


def _tokens(context: Context) -> int:
    return 400 if context.on_gpu else 40


def _prompts(count: int) -> list[list[int]]:
    return [[50 + i % 40] * (3 + i % 40) for i in range(count)]


def _compare(context: Context, engine: Engine, score_error: float, log_prob_error: float) -> str:
    """Sample requests that want scores, log-probs or both at once, and ask the plain model in float32 the same."""
    prompts, folder = _prompts(48 if context.on_gpu else 12), model_folder(context)
    done = _mixed(engine, prompts, _tokens(context))
    score = _score_error(Scorer.from_folder(folder, dtype="float32"), prompts, done)
    mean = _log_prob_error(plain_model(context, folder), prompts, done)
    require(score < score_error, f"scores are up to {score:.2g} off; at most {score_error}")
    require(mean < log_prob_error, f"log-probs are {mean:.2g} off on average; at most {log_prob_error}")
    return f"scores within {score:.2g} of float32, log-probs {mean:.2g} off on average"


def _wants(index: int) -> tuple[bool, bool]:
    """Whether a request wants log-probs, and scores."""
    return index % 2 == 0, index % 3 != 2


def _mixed(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> list[Completion]:
    samples = []
    for i, prompt in enumerate(prompts):
        log_probs, scores = _wants(i)
        params = SamplingParams(max_tokens=tokens, temperature=TEMPERATURE, ignore_eos=True, log_probs=log_probs)
        samples += engine.samples(prompt, params, return_scores=scores)
        engine.add(samples[-1])
    done: dict[Sample, Completion] = {}
    while engine.has_unfinished():
        done.update(engine.step())
    return [done[sample] for sample in samples]


def _score_error(scorer: Scorer, prompts: Sequence[list[int]], done: Sequence[Completion]) -> float:
    asked = [i for i in range(len(prompts)) if _wants(i)[1]]
    wanted = scorer.score([prompts[i] + done[i].token_ids for i in asked], [len(prompts[i]) for i in asked])
    found = [done[i].step_scores or [] for i in asked]
    for steps, scored in zip(found, wanted, strict=True):
        require(len(steps) == len(scored.step_scores), "vLLM counts other steps than the scorer")
    require(any(scored.step_scores for scored in wanted), "no response has a step")
    return max(abs(aggregate(steps) - scored.value) for steps, scored in zip(found, wanted, strict=True))


def _log_prob_error(model: PreTrainedModel, prompts: Sequence[list[int]], done: Sequence[Completion]) -> float:
    off = [
        (token_log_probs(model, prompt, one.token_ids, TEMPERATURE) - torch.tensor(one.log_probs)).abs()
        for i, (prompt, one) in enumerate(zip(prompts, done, strict=True))
        if _wants(i)[0]
    ]
    return float(torch.cat(off).mean())


def _milliseconds(engine: Engine, rows: int, length: int, **sampling: Any) -> float:
    """Of a step once every response has `length` tokens."""
    tokens = length + MEASURED_STEPS + 20
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=TEMPERATURE, **sampling)
    samples = [sample for prompt in _prompts(rows) for sample in engine.samples(prompt, params)]
    for sample in samples:
        engine.add(sample)
    for _ in range(length):
        engine.step()
    each = seconds(engine.step, MEASURED_STEPS) * 1e3
    engine.abort(samples)
    return each
