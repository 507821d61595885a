"""Packed attention against transformers' own on padded rows, and two real ranks that share the tokens against one.

This file is also the program that the two ranks run (see `two_ranks`).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from verl.models import ulysses
from xbai.engine.packed_attention import (
    PACKED_ATTENTION,
    Packing,
    SharedPrefixPacking,
    _by_sequence,
    _varlen,
    packed_attention,
)
from xbai.errors import UserError

CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
LENGTHS = (5, 1, 8, 3)
HIDDEN, LAYERS = 24, 3


@dataclass(frozen=True)
class Shared:
    """A model whose 17 tokens and one that fills up two ranks share: the seam lies within the third sequence."""

    architecture: str
    heads: int
    kv_heads: int
    checkpointing: bool = True


SHARED = {
    "kv heads divide": Shared("qwen3", 4, 2),
    "one kv head, repeated": Shared("qwen2", 2, 1),
    "three kv heads, repeated": Shared("llama", 6, 3),
    "no checkpointing": Shared("qwen3", 4, 2, checkpointing=False),
}


def make_model(architecture: str, heads: int = 4, kv_heads: int = 2, **options: object) -> PreTrainedModel:
    config = CONFIGS[architecture](
        vocab_size=40,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HIDDEN // heads,
        initializer_range=0.15,
        **options,
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config, attn_implementation="eager").train()


def make_rows() -> tuple[list[Tensor], Tensor]:
    """Rows of `LENGTHS` token ids, and weights [N, hidden] that make a loss of the hidden states."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 40, (length,), generator=generator) for length in LENGTHS]
    return ids, torch.randn(sum(LENGTHS), HIDDEN, generator=generator) / sum(LENGTHS)


def make_packing(lengths: tuple[int, ...], sp_group: dist.ProcessGroup | None = None) -> Packing:
    extents = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), max(lengths)
    return Packing(*extents) if sp_group is None else ulysses.UlyssesPacking(*extents, sp_group)


def positions(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def padded_reference(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states [N, hidden] and gradients by transformers' eager attention on padded rows."""
    ids, weights = make_rows()
    mask = pad_sequence([torch.ones(length, dtype=torch.bool) for length in LENGTHS], batch_first=True)
    padded = pad_sequence(ids, batch_first=True)
    model.set_attn_implementation("eager")
    hidden = model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state[mask]
    (hidden * weights).sum().backward()
    return hidden.detach(), take_gradients(model)


def packed_result(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    ids, weights = make_rows()
    model.set_attn_implementation(PACKED_ATTENTION)
    hidden = model(
        input_ids=torch.cat(ids)[None],
        position_ids=positions(LENGTHS)[None],
        packing=make_packing(LENGTHS),
        use_cache=False,
    ).last_hidden_state[0]
    (hidden * weights).sum().backward()
    return hidden.detach(), take_gradients(model)


def take_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected[1].values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_packed_is_padded(architecture: str, checkpointing: bool) -> None:
    model = make_model(architecture)
    expected = padded_reference(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(packed_result(model), expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_sliding_window_is_honoured(architecture: str) -> None:
    windowed = make_model(architecture, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    expected = padded_reference(windowed)
    assert_same(packed_result(windowed), expected)
    assert not torch.allclose(packed_result(make_model(architecture))[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("block", [2, 1024])
def test_a_shared_prefix_is_attended_to_by_all(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens abcdefg hi j: the sequences abcdefg, abchi, abcdj with one copy of what they share."""
    monkeypatch.setattr("xbai.engine.packed_attention.BLOCK", block)
    options = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    model = make_model("qwen2", **options).eval()
    model.set_attn_implementation(PACKED_ATTENTION)
    paths = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 7, 8], [0, 1, 2, 3, 9]]
    own = torch.tensor([0, 7, 9, 10], dtype=torch.int32)
    keys = torch.tensor([0, 7, 12, 17], dtype=torch.int32)
    packing = SharedPrefixPacking(own, 7, torch.tensor([i for path in paths for i in path]), keys, 7)
    ids, position_ids = torch.arange(1, 11)[None], torch.tensor([[0, 1, 2, 3, 4, 5, 6, 3, 4, 4]])
    with torch.no_grad():
        shared = model(input_ids=ids, position_ids=position_ids, packing=packing, use_cache=False).last_hidden_state[0]
        for path in paths:
            alone = model(input_ids=ids[:, path], packing=make_packing((len(path),)), use_cache=False)
            torch.testing.assert_close(shared[path], alone.last_hidden_state[0], rtol=1e-5, atol=1e-5)


def test_a_call_without_packing_says_what_is_missing() -> None:
    model = make_model("qwen3")
    model.set_attn_implementation(PACKED_ATTENTION)
    with pytest.raises(ValueError, match=r"packing=Packing\(\.\.\.\)"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input_ids \[1, N\]"):
        model(input_ids=torch.ones(2, 4, dtype=torch.int64), packing=make_packing((4, 4)))


def test_attention_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match="attention_dropout"):
        packed_result(make_model("qwen3", attention_dropout=0.1))
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UserError, match="softcap"):
        packed_attention(nn.Module(), x, x, x, None, packing=make_packing((4,)), softcap=30.0)


def test_lengths_that_are_not_the_tokens_are_an_error() -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="sum exactly to 4"):
        packed_attention(nn.Module(), x, x, x, None, packing=make_packing((2, 3)))


def test_the_kernel_of_pytorch_takes_what_it_is_given() -> None:
    """Shapes and gradients by PyTorch's shape functions alone: the kernel itself needs a GPU."""
    packing = Packing(torch.empty(3, dtype=torch.int32, device="meta"), 4)
    buffer = torch.empty(7, 8, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    query, key, value = buffer.split([4, 2, 2], dim=1)
    for window in (None, 3):
        output = _varlen(query, key, value, packing, 0.25, window)
        assert output.shape == query.shape
        assert torch.autograd.grad(output.sum(), buffer)[0].shape == buffer.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shared", [0, 2])
def test_the_kernels_of_a_gpu_equal_attention_by_sequence(window: int | None, shared: int) -> None:
    """`shared`: tokens of the first sequence that the others attend to as well."""
    generator = torch.Generator("cuda").manual_seed(0)
    ends = [0, *accumulate(LENGTHS)]
    keys = [[*range(shared if start else 0), *range(start, stop)] for start, stop in pairwise(ends)]
    packing = SharedPrefixPacking(
        torch.tensor(ends, dtype=torch.int32, device="cuda"),
        max(LENGTHS),
        torch.tensor([i for row in keys for i in row], device="cuda"),
        torch.tensor([0, *accumulate(map(len, keys))], dtype=torch.int32, device="cuda"),
        max(map(len, keys)),
    )
    buffer = torch.randn(sum(LENGTHS), 8, 32, device="cuda", generator=generator)
    results = []
    for compute, dtype in ((_by_sequence, torch.float32), (_varlen, torch.bfloat16)):
        leaf = buffer.to(dtype).requires_grad_()
        output = compute(*packing.gather(*leaf.split([4, 2, 2], dim=1)), packing, 0.2, window)
        output.square().sum().backward()
        results.append((output.float(), leaf.grad.float()))
    torch.testing.assert_close(results[1], results[0], rtol=3e-2, atol=3e-2)


def test_heads_that_do_not_divide_are_refused() -> None:
    ulysses.check_head_counts(28, 4, 7)
    with pytest.raises(UserError, match=r"ulysses_sequence_parallel_size=8 .* 28 attention heads: .* 1, 2, 4, 7, 14"):
        ulysses.check_head_counts(28, 4, 8)


@pytest.fixture
def lone_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ranks_that_do_not_divide_are_refused(lone_rank: None) -> None:
    assert ulysses.sequence_parallel_group(1) is None
    with pytest.raises(UserError, match="ulysses_sequence_parallel_size=2 does not divide the 1 ranks"):
        ulysses.sequence_parallel_group(2)


def exchange_heads(group: dist.ProcessGroup) -> None:
    """Check on this rank that random tensors are divided by heads as said, and that they come back, gradients too."""
    rank, draw, generator = dist.get_rank(group), random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(40):
        kv_heads, tokens, size = draw.randint(1, 6), draw.randint(1, 5), draw.randint(1, 4)
        heads = kv_heads * draw.randint(1, 3) * (2 if kv_heads % 2 else 1)
        whole = [torch.randn(2 * tokens, count, size, generator=generator) for count in (heads, kv_heads, kv_heads)]
        local = [x[rank * tokens :][:tokens].clone().requires_grad_() for x in whole]
        divided = ulysses.split_heads(*local, group)
        groups = heads // kv_heads
        for mine in range(heads // 2):
            head = rank * (heads // 2) + mine
            assert torch.equal(divided[0][:, mine], whole[0][:, head])
            of_mine = mine // (heads // 2 // divided[1].shape[1])
            assert torch.equal(divided[1][:, of_mine], whole[1][:, head // groups])
            assert torch.equal(divided[2][:, of_mine], whole[2][:, head // groups])
        back = ulysses.join_heads(divided[0], group)
        assert torch.equal(back, local[0])
        back.backward(whole[0][:tokens])
        assert torch.equal(local[0].grad, whole[0][:tokens])


def shared_result(case: Shared, group: dist.ProcessGroup) -> dict[str, object]:
    """What the two ranks compute together, sharded by FSDP2, and how many all-to-alls this rank took part in."""
    model = make_model(case.architecture, case.heads, case.kv_heads)
    model.set_attn_implementation(PACKED_ATTENTION)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    ids, weights = make_rows()
    lengths = (*LENGTHS, 1)
    here = slice(None, 9) if dist.get_rank(group) == 0 else slice(9, None)
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchange:
        hidden = model(
            input_ids=nn.functional.pad(torch.cat(ids), (0, 1))[None, here],
            position_ids=positions(lengths)[None, here],
            packing=make_packing(lengths, group),
            use_cache=False,
        ).last_hidden_state[0]
        (hidden * nn.functional.pad(weights, (0, 0, 0, 1))[here]).sum().backward()
    slices = [torch.empty_like(hidden) for _ in range(2)]
    dist.all_gather(slices, hidden.detach(), group=group)
    # FSDP2 takes the mean over the ranks of what are shares of a sum.
    gradients = {name: parameter.grad.full_tensor() * 2 for name, parameter in model.named_parameters()}
    return {"result": (torch.cat(slices)[:-1], gradients), "exchanges": exchange.call_count}


def run_rank(output: Path) -> None:
    """What each of two ranks does; rank 0 writes what came out."""
    dist.init_process_group("gloo")
    group = ulysses.sequence_parallel_group(2)
    exchange_heads(group)
    results = {name: shared_result(case, group) for name, case in SHARED.items()}
    if dist.get_rank() == 0:
        torch.save(results, output)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Run this file on two processes and read what rank 0 wrote."""
    output = tmp_path_factory.mktemp("two") / "results.pt"
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARED)
def test_two_ranks_compute_what_one_does(case: str, two_ranks: dict) -> None:
    shared = SHARED[case]
    expected = padded_reference(make_model(shared.architecture, shared.heads, shared.kv_heads))
    assert_same(two_ranks[case]["result"], expected)


@pytest.mark.slow
def test_two_exchanges_a_layer_and_again_in_backward_and_recomputation(two_ranks: dict) -> None:
    assert {name: two_ranks[name]["exchanges"] for name in SHARED} == {
        name: LAYERS * (6 if case.checkpointing else 4) for name, case in SHARED.items()
    }


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
