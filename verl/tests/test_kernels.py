"""Compiled and Liger's kernels: the same numbers as without them, in the model they were asked for and no other."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from verl.models.liger import apply_liger, check_liger, has_liger_kernels
from verl.models.loading import build_joint_model
from verl.models.log_probs import LMHead, token_log_probs
from verl.utils.compiler import check_compiler
from xbai.errors import UserError

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("compute_entropy", [True, False])
def test_fused_log_probs_are_the_plain_ones(compute_entropy: bool) -> None:
    torch.manual_seed(0)
    lm_head = nn.Linear(16, 50, bias=False)

    def values_and_gradients(tokens: int, fused: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, 16, generator=generator, requires_grad=True)
        labels, weights = torch.randint(0, 50, (tokens,), generator=generator), torch.randn(tokens, generator=generator)
        pair = token_log_probs(
            hidden,
            LMHead.of(lm_head),
            labels,
            temperature=0.7,
            compute_entropy=compute_entropy,
            logits_per_chunk=50 * 8,
            fused=fused,
        )
        values = [value for value in pair if value is not None]
        loss = sum((weights * value).sum() for value in values)
        return [*values, *torch.autograd.grad(loss, (hidden, lm_head.weight))]

    # A rank without a token, one token, and chunks whose last one is shorter.
    for tokens in (0, 1, 21):
        for ours, plain in zip(values_and_gradients(tokens, True), values_and_gradients(tokens, False), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@needs_compiler
def test_use_fused_kernels_compiles(tiny_model_dir: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for fused, expected in ((False, 0), (True, 1)):
        model = build_joint_model(tiny_model_dir, fused_kernels=fused).eval()
        # Other numbers of tokens, none and one included, need no other kernel.
        for tokens in (3, 0, 1, 7):
            token_log_probs(
                torch.randn(tokens, model.lm.config.hidden_size),
                model.gathered_lm_head(),
                torch.arange(tokens),
                fused=model.fused_kernels,
            )
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == expected


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"^use_fused_kernels=true needs a compiler .* g\+\+, clang\+\+ is here"):
        check_compiler("use_fused_kernels=true", "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="none of no-such-compiler is here"):
        check_compiler("use_fused_kernels=true", "cpu")


@pytest.fixture
def liger_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Liger's two functions as formulas in place of its Triton kernels, which CPUs cannot run."""
    calls: list[str] = []

    def liger_rms_norm(x: Tensor, weight: Tensor, eps: float, *, in_place: bool) -> Tensor:
        calls.append("rms_norm")
        return F.rms_norm(x, weight.shape, weight, eps)

    def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
        calls.append("swiglu")
        return F.silu(gate) * up

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm, functional.liger_swiglu = liger_rms_norm, liger_swiglu
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    return calls


def test_liger_runs_in_one_model_only(liger_calls: list[str], tiny_model_dir: Path) -> None:
    model, other = (AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32) for _ in range(2))
    apply_liger(model)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = other(ids).logits
        assert not liger_calls
        torch.testing.assert_close(model(ids).logits, expected)
    layers = model.config.num_hidden_layers
    # Two norms of the residual stream and two of queries and keys in each layer, and the last one.
    assert (liger_calls.count("rms_norm"), liger_calls.count("swiglu")) == (4 * layers + 1, layers)


def test_code_that_may_not_run_has_no_kernels_and_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked whether to run it"))
    assert not has_liger_kernels(PretrainedConfig(auto_map={"AutoModelForCausalLM": "modeling.Model"}))


def test_liger_is_refused_where_it_cannot_act(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model\.use_liger=true needs a GPU"):
        check_liger("cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs liger-kernel \(pip install"):
        check_liger("cuda")
