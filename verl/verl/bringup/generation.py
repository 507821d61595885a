"""The hf engine, which needs no vLLM: batches, log-probs, and weights that the trainer sends."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from verl.bringup.step import GIB, Context, require, seconds, step
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
    of_all = seconds(lambda: engine.generate([[57, 58]] * rows, SamplingParams(max_tokens=64, ignore_eos=True)))
    return f"log-probs within {worst:.2g}; {rows * 64 / of_all:,.0f} tokens/s in {rows} rows"


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
        before = token_ids(engine, PROMPTS, GREEDY)
        turned_around = ((name, weight.flip(0)) for name, weight in named_full_tensors(policy.model))
        engine.update_weights(turned_around, check=True)
        require(token_ids(engine, PROMPTS, GREEDY) != before, "other weights gave the same greedy tokens")
        of_sync = seconds(lambda: engine.update_weights(named_full_tensors(policy.model), check=True))
        require(token_ids(engine, PROMPTS, GREEDY) == before, "the same weights gave other greedy tokens")
    gib = sum(parameter.numel() * 4 for parameter in policy.model.parameters()) / GIB
    return f"checksums agree; {gib:.2g} GiB in {of_sync:.2g} s"


def token_ids(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    """Of every response to every prompt."""
    return [[one.token_ids for one in group] for group in engine.generate(prompts, params)]


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """[len(response)] on the CPU, of the response's tokens under softmax(logits / temperature)."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu()
