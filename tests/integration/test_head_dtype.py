"""Log-probs of a bfloat16 model whose LM head gives float32: those of a float32 head on the same hidden states."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from xbai.engine import Engine, SamplingParams, load_engine

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
PEAKED = 8.0
"""Makes of a random model's logits ones that are as far apart, and as coarse in bfloat16, as a reasoning model's."""
PROMPT = [1, 2, 3, 4]
LENGTH = 40


def make_peaked(folder: Path) -> PreTrainedModel:
    """The model of `folder` with sharper opinions, also in its files."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.model.norm.weight.data *= PEAKED
    model.save_pretrained(folder)
    return model


@contextmanager
def hidden_states(engine: Engine) -> Iterator[list[Tensor]]:
    """What the LM head of an engine is given, [rows, c] for each of its passes."""
    if hasattr(engine, "_model"):
        module, argument = engine._model.lm_head, 0
    else:
        runner = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        module, argument = runner.get_model().logits_processor, 1
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[argument].flatten(0, -2).clone())

    hook = module.register_forward_pre_hook(keep)
    yield found
    hook.remove()


def errors(engine: Engine, model: PreTrainedModel, temperature: float) -> tuple[float, float]:
    """Of a response: how far its log-probs are from those of float32 logits (root mean square), and its tokens from the
    likeliest ones (the largest difference of log-probs)."""
    params = SamplingParams(max_tokens=LENGTH, temperature=temperature, seed=0, log_probs=True, ignore_eos=True)
    with hidden_states(engine) as found, torch.no_grad():
        [[completion]] = engine.generate([PROMPT], params)
        states = torch.cat([rows[-1:] for rows in found])
        assert states.dtype == torch.bfloat16
        exact = (states.float() @ model.lm_head.weight.float().T).log_softmax(-1)
    of_tokens = exact[range(LENGTH), completion.token_ids]
    error = (of_tokens - torch.tensor(completion.log_probs)).pow(2).mean().sqrt().item()
    return error, (exact.max(-1).values - of_tokens).max().item()


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.long), True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["hf", pytest.param("vllm", marks=needs_vllm)])
def test_float32_logits_are_not_rounded(name: str, tied: bool, make_tiny_model: Callable[..., Path]) -> None:
    folder = make_tiny_model(tied=tied)
    model, other = make_peaked(folder), make_peaked(make_tiny_model(tied=tied, seed=1))
    found = {}
    for head_dtype in ("model", "float32"):
        # vLLM's own model, and the one that has the score head inside.
        engine = load_engine(name, folder, dtype="bfloat16", head_dtype=head_dtype, with_scores=not tied)
        found[head_dtype] = [errors(engine, model, 0.0), errors(engine, model, 1.0)]
        engine.update_weights(other.named_parameters(), check=True)
        found[head_dtype] += [errors(engine, other, 0.0), errors(engine, other, 1.0)]
        engine.close()
    assert all(5e-3 < error < 5e-2 for error, _ in found["model"])
    assert all(error < 5e-6 for error, _ in found["float32"])
    assert all(behind < 5e-6 for _, behind in found["float32"][::2]), "greedy"
