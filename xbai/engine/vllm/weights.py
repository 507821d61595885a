"""Where vLLM keeps the weights of a checkpoint: fused, cut and packed; to be imported on demand, like vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.v1.worker.worker_base import WorkerBase

from xbai.engine.files import LM_HEAD
from xbai.engine.weight_check import HeldWeight

EMBEDDING = "model.embed_tokens.weight"
_IDENTITY_ROWS = 1024


def held_weights(worker: WorkerBase) -> dict[str, HeldWeight]:
    """What this rank holds of each weight, by its name in the checkpoint."""
    runner: Any = worker.model_runner
    model = runner.get_model()
    held: dict[str, HeldWeight] = {}
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        leaves = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
        for kind, parameter in module.named_parameters(recurse=False):
            for name, (rows, part) in zip(leaves, _parts(module, kind), strict=True):
                full_name = ".".join(filter(None, (parent, name, kind)))
                held[full_name] = HeldWeight(part, parameter.dtype, partial(_copies, module, kind, rows))
    if worker.model_config.hf_config.tie_word_embeddings and LM_HEAD in held:
        embedding, head = held[EMBEDDING], held[LM_HEAD]
        held[EMBEDDING] = HeldWeight(embedding.part, embedding.dtype, lambda: chain(embedding.copies(), head.copies()))
    return held


def _parts(module: nn.Module, kind: str) -> list[tuple[slice, tuple[slice, ...]]]:
    """For each weight fused into a module's: its rows there, and what they are of the whole weight."""
    if isinstance(module, RowParallelLinear) and kind == "weight":
        return [(slice(None), (slice(None), _cut(module.tp_rank, module.input_size_per_partition)))]
    if isinstance(module, VocabParallelEmbedding):
        rows = module.shard_indices
        known = slice(rows.org_vocab_start_index, rows.org_vocab_end_index)
        return [(slice(known.stop - known.start), (known,))]
    if isinstance(module, QKVParallelLinear):
        of_keys = module.tp_rank // module.num_kv_head_replicas
        sizes = [module.num_heads * module.head_size, module.num_kv_heads * module.head_size]
        return _fused([*sizes, module.num_kv_heads * module.v_head_size], [module.tp_rank, of_keys, of_keys])
    if isinstance(module, MergedColumnParallelLinear):
        sizes = [size // module.tp_size for size in module.output_sizes]
        return _fused(sizes, [module.tp_rank] * len(sizes))
    if isinstance(module, ColumnParallelLinear):
        return _fused([module.output_size_per_partition], [module.tp_rank])
    return [(slice(None), ())]


def _fused(sizes: list[int], indices: list[int]) -> list[tuple[slice, tuple[slice, ...]]]:
    ends = accumulate(sizes)
    return [
        (slice(end - size, end), (_cut(index, size),)) for size, index, end in zip(sizes, indices, ends, strict=True)
    ]


def _cut(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


def _copies(module: nn.Module, kind: str, rows: slice) -> Iterator[Tensor]:
    parameter = getattr(module, kind)
    if parameter.numel():
        yield parameter[rows]
    if kind == "weight" and hasattr(module, "cpu_linear"):
        yield _packed_weight(module)[rows]


def _packed_weight(module: Any) -> Tensor:
    """The weight [out, in] of a layer whose matrix product on CPU uses a packed copy: what it makes of unit vectors."""
    inputs = getattr(module, "input_size_per_partition", None) or module.embedding_dim
    dtype = module.weight.dtype
    columns = []
    for start in range(0, inputs, _IDENTITY_ROWS):
        unit = torch.zeros(min(_IDENTITY_ROWS, inputs - start), inputs, dtype=dtype)
        unit[:, start:].fill_diagonal_(1)
        columns.append(module.cpu_linear(unit, module.weight, None))
    return torch.cat(columns).T
