"""The hf engine, which needs no vLLM: batches, log-probs, and weights that the trainer sends."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl.bringup.driver import now
from verl.bringup.step import Context, require, step
from verl.bringup.workload import build_policy, fsdp_section, model_folder, plain_model, process_group
from verl.models.fsdp import named_full_tensors
from xbai.engine import Engine, SamplingParams, load_engine

PROMPTS = [[57, 58, 59], [71] * 20, [55]]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, log_probs=True, ignore_eos=True)
LOG_PROB_ERROR = 1e-3


@step(
    means="The transformers engine gives other tokens in a batch than for one prompt alone, or log-probs that are not "
    "the model's: padding and cache positions (xbai/engine/hf/engine.py) on this torch or transformers.",
    quick=True,
)
def hf_engine(context: Context) -> str:
    """Greedy tokens of a batch are those of single rows, log-probs the plain model's, in float32; tokens a second."""
    folder = model_folder(context)
    engine = load_engine("hf", folder, dtype="float32", with_scores=False)
    together = [completion for (completion,) in engine.generate(PROMPTS, GREEDY)]
    alone = [engine.generate([prompt], GREEDY)[0][0] for prompt in PROMPTS]
    require([one.token_ids for one in together] == [one.token_ids for one in alone], "a batch has other greedy tokens")
    model = plain_model(context, folder)
    worst = max(
        float((token_log_probs(model, prompt, one.token_ids) - torch.tensor(one.log_probs)).abs().max())
        for prompt, one in zip(PROMPTS, together, strict=True)
    )
    require(worst < LOG_PROB_ERROR, f"log-probs are up to {worst:.3g} off; at most {LOG_PROB_ERROR}")
    rows = 64 if context.on_gpu else 8
    started = now()
    engine.generate([[57, 58]] * rows, SamplingParams(max_tokens=64, ignore_eos=True))
    return f"log-probs within {worst:.2g}; {rows * 64 / (now() - started):,.0f} tokens/s in {rows} rows"


@step(
    means="Weights that the trainer gathers do not reach the hf engine as they are: with vLLM, whose update goes the "
    "same way, a run would sample from another policy than the one it trains. See xbai/engine/weight_check.py.",
    quick=True,
)
def hf_weight_sync(context: Context) -> str:
    """After a sync, with checksums, the engine generates what the trainer's model does, and no more what it did."""
    folder = model_folder(context)
    with process_group():
        policy = build_policy(folder, fsdp_section(), with_head=False)
        engine = load_engine("hf", folder, dtype="float32", with_scores=False)
        before = _greedy(engine)
        engine.update_weights(_turned_around(named_full_tensors(policy.model)), check=True)
        require(_greedy(engine) != before, "other weights gave the same greedy tokens")
        started = now()
        engine.update_weights(named_full_tensors(policy.model), check=True)
        seconds = now() - started
        require(_greedy(engine) == before, "the same weights gave other greedy tokens")
    gib = sum(parameter.numel() * 4 for parameter in policy.model.parameters()) / 2**30
    return f"checksums agree; {gib:.2g} GiB in {seconds:.2g} s"


def _turned_around(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, weight.flip(0)) for name, weight in weights)


def _greedy(engine: Engine) -> list[list[int]]:
    return [completion.token_ids for (completion,) in engine.generate(PROMPTS, GREEDY)]


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """[len(response)] on the CPU, of the response's tokens under softmax(logits / temperature)."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
