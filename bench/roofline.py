"""Where the time of a training step's forward and backward passes would go on a GPU: a model, made without one.

    python bench/roofline.py [--recipe single] [--mean-length 4608] [--out FILE] [key=value ...]

Takes a recipe's configuration (`scripts/run_{single,multi}_node.sh`, and any keys that follow), builds the trainer's
own joint model on the meta device, records every operation of one full micro-batch of a GPU with its real shapes, and
gives each operation

    max(FLOPs / rate, bytes of its tensors / bandwidth, latency)

with the rates of an H100 SXM unless told otherwise. Phases: the policy's log-probs with entropies, the reference's, and
the update, which also has variants that settings or libraries would give, each on top of those before it. Not modelled:
communication, the optimiser, the host, how operations overlap; an operation of several kernels counts as one. So these
are upper bounds of what to hope for, and show what dominates. MFU counts model FLOPs, no recomputation.

Sequence parallelism is taken as so many whole sequences a GPU: as many FLOPs, without the exchange. The LM head's
products count at the rate of 16 bits: on GPUs their operands are in 16 bits, and what they give is in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from machine import ROOT, report, rounded
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from verl.models import log_probs as torch_functional
from verl.models.joint_model import JointModel
from verl.models.liger import apply_liger
from verl.models.packing import packed_layout
from verl.trainer.config.schema import YAML, PPOConfig
from verl.trainer.config.validation import validated
from verl.trainer.planning.memory_estimate import GIB, saved_activations
from verl.trainer.planning.memory_phases import PhaseMemory
from verl.trainer.planning.model_shapes import ModelShape, config_of
from xbai.engine import packed_attention
from xbai.errors import UserError, exit_on_user_error
from xbai.sprm import ScoreHead

RECIPES = ("single", "multi")
KINDS = ("GEMM", "attention", "elementwise", "head GEMM", "head elementwise")
TOKENS_PER_STEP = 64
aten = torch.ops.aten
# What reads or writes single rows of a table, not all of it.
LOOKUPS = (aten.embedding, aten.gather, aten.index, aten.index_select, aten.scatter_add_, aten.index_put_)
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches: operations and bytes per second, and the seconds of the shortest operation.

    Attributes:
        peak: of matrix products, what MFU refers to.
        gemm: of large matrix products.
        attention: of the forward and the backward pass of FlashAttention-2.
        attention_3: the same of FlashAttention-3.
        bandwidth: of memory.
        latency: of an operation, however small.
    """

    peak: float
    gemm: float
    attention: tuple[float, float]
    attention_3: tuple[float, float]
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: one of `KINDS`.
        flops, size: floating-point operations, and bytes read and written.
        backward: which of attention's rates it has.
        on_logits: it goes over all logits of a chunk, and a fused kernel would stand for it.
        fused_size: bytes that a fused kernel moves for the logits that this product makes or takes.
    """

    kind: str
    flops: float
    size: float
    backward: bool = False
    on_logits: bool = False
    fused_size: float = 0.0


@dataclass(frozen=True)
class Variant:
    """How a pass is computed."""

    name: str
    checkpointing: bool = True
    fused_head: bool = False
    liger: bool = False
    attention_3: bool = False


def variants() -> list[Variant]:
    """Each on top of those before it."""
    steps = {"fused_head": True, "liger": True, "attention_3": True, "checkpointing": False}
    names = ("use_fused_kernels", "use_liger", "FlashAttention-3", "no checkpointing")
    found = [Variant("plain")]
    for name, (field, value) in zip(names, steps.items()):
        found.append(replace(found[-1], name=f"+ {name}", **{field: value}))
    return found


@dataclass(frozen=True)
class Work:
    """One forward pass of a GPU, with or without its backward pass."""

    model: PretrainedConfig
    sequences: list[int]
    prompt: int
    entropy: bool
    trains: bool

    @property
    def predicted(self) -> int:
        """Response tokens."""
        return sum(self.sequences) - self.prompt * len(self.sequences)

    @property
    def model_flops(self) -> float:
        """Without recomputation."""
        forward = ModelShape.from_config(self.model).sequence_flops(self.sequences, self.predicted)
        return forward * (3 if self.trains else 1)

    def ops(self, variant: Variant) -> list[Op]:
        """What the trainer's model computes, in order."""
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(
                self.model, dtype=torch.bfloat16, attn_implementation=packed_attention.PACKED_ATTENTION
            )
            joint = JointModel(lm, ScoreHead(self.model.hidden_size), logits_dtype=torch.float32)
        joint.train(self.trains)
        if variant.checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if variant.liger:
            apply_liger(lm)
        recorder = Recorder(self)
        chunks = fused_chunks() if variant.fused_head else nullcontext()
        with liger_kernels(), varlen_attention(), chunks, torch.set_grad_enabled(self.trains):
            layout = packed_layout(self._batch(), torch.device("meta"))
            with recorder:
                output = joint(layout, compute_entropy=self.entropy)
                if self.trains:
                    sum(part.sum() for part in output if part is not None).backward()
        return list(_with_fused_head(recorder.ops)) if variant.fused_head else recorder.ops

    def _batch(self) -> dict[str, Tensor]:
        lengths = torch.tensor(self.sequences)
        responses = torch.arange(int(lengths.max()) - self.prompt) < (lengths - self.prompt)[:, None]
        mask = torch.cat([torch.ones(len(lengths), self.prompt, dtype=torch.bool), responses], 1)
        steps = (torch.arange(mask.shape[1]) % TOKENS_PER_STEP == 0) & mask
        steps[:, : self.prompt] = False
        return {
            "input_ids": torch.zeros(mask.shape, dtype=torch.long),
            "attention_mask": mask.long(),
            "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0),
            "response_mask": responses,
            "step_feature_mask": steps,
        }


class Recorder(TorchDispatchMode):
    """Keeps the `Op` of everything that is computed inside."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._vocabulary, self._hidden = work.model.vocab_size, work.model.hidden_size
        self._pairs = sum(length * (length + 1) // 2 for length in work.sequences)
        self._reads = 2 if work.entropy else 1
        self.ops: list[Op] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not _is_free(func, given, made):
            self.ops.append(self._op(func, args, kwargs, out, given, made))
        return out

    def _op(self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]) -> Op:
        packet, tensors = func.overloadpacket, given + made
        size = float(sum(map(_held, tensors)))
        if func.namespace == "torch_attn":
            # Two products in the forward pass; five, of which one is computed again, in the backward pass.
            backward = "backward" in func.name()
            query = next(tensor for tensor in given if tensor.ndim == 3)
            products = 5 if backward else 2
            return Op("attention", 2.0 * products * query.shape[1] * query.shape[2] * self._pairs, size, backward)
        if packet in LOOKUPS:
            return Op("elementwise", 0.0, 2.0 * min(map(_held, tensors[-2:])))
        of_head = any(self._vocabulary in tensor.shape for tensor in tensors)
        if packet in flop_registry:
            # The factors alone: the formulas know no `out_dtype`.
            flops = float(flop_registry[packet](*(one for one in args if isinstance(one, Tensor)), out_val=out))
            return Op("head GEMM" if of_head else "GEMM", flops, size, fused_size=self._fused_size(given, made[0]))
        on_logits = any(tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary for tensor in tensors)
        return Op("head elementwise" if of_head else "elementwise", 0.0, size, on_logits=on_logits)

    def _fused_size(self, factors: list[Tensor], product: Tensor) -> float:
        """Of the log-probs' kernel: it reads new logits, twice with entropies; for the gradient of the hidden states it
        has read them once more and written theirs, which are then rounded to what is multiplied."""
        left, right = factors[-2:]
        if right.shape == (self._hidden, self._vocabulary):
            return float(self._reads * product.nbytes)
        return float(3 * 4 * left.numel() + left.nbytes) if left.shape[-1] == self._vocabulary else 0.0


def _is_free(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Views and allocations move nothing."""
    if func.overloadpacket in ALLOCATIONS or not made:
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return not func._schema.is_mutable and all(tensor.untyped_storage()._cdata in storages for tensor in made)


def _held(tensor: Tensor) -> int:
    # What is expanded is read once.
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _with_fused_head(ops: list[Op]) -> Iterator[Op]:
    """The operations with one kernel in place of those that go over a chunk's logits."""
    for op in ops:
        if not op.on_logits:
            yield op
        if op.fused_size:
            yield Op("head elementwise", 0.0, op.fused_size)


@contextmanager
def fused_chunks() -> Iterator[None]:
    """Chunks of tokens as large as the fused kernel's."""
    with mock.patch.object(torch_functional, "LOGITS_PER_CHUNK", torch_functional.LOGITS_PER_FUSED_CHUNK):
        yield


@contextmanager
def varlen_attention() -> Iterator[None]:
    """Packed attention as on a GPU, by torch's kernel, which has an implementation for the meta device."""
    with (
        mock.patch.object(packed_attention, "_has_varlen_kernel", lambda query: True),
        mock.patch.object(packed_attention, "is_flash_attn_2_available", lambda: False),
    ):
        yield


@contextmanager
def liger_kernels() -> Iterator[None]:
    """Liger's two functions as single operations of the meta device, which Triton does not know."""
    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_rms_norm = lambda x, weight, eps, *, in_place: _RmsNorm.apply(x, weight)
    functional.liger_swiglu = _SwiGlu.apply
    parents = {name: ModuleType(name) for name in ("liger_kernel", "liger_kernel.transformers")}
    with mock.patch.dict(sys.modules, parents | {functional.__name__: functional}):
        yield


@torch.library.custom_op("roofline::fused", mutates_args=())
def fused(inputs: list[Tensor], outputs: int) -> list[Tensor]:
    """A kernel that reads all inputs and writes as many tensors like the first ones."""
    raise NotImplementedError("it has shapes only")


@fused.register_fake
def _(inputs: list[Tensor], outputs: int) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in inputs[:outputs]]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return fused([x, weight], 1)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return tuple(fused([x, weight, gradient], 2))


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return fused([gate, up], 1)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(fused([*ctx.saved_tensors, gradient], 2))


def modelled(work: Work, variant: Variant, rates: Rates) -> dict[str, Any]:
    """Seconds by kind and together, the MFU, and in an update the memory of what the backward pass needs."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for op in work.ops(variant):
        rate = rates.gemm
        if op.kind == "attention":
            rate = (rates.attention_3 if variant.attention_3 else rates.attention)[op.backward]
        seconds[op.kind] += max(op.flops / rate, op.size / rates.bandwidth, rates.latency)
    together = sum(seconds.values())
    mfu = work.model_flops / together / rates.peak
    found = {"tokens": sum(work.sequences), "seconds": seconds, "sum": together, "mfu": mfu}
    if work.trains:
        shape, width = ModelShape.from_config(work.model), torch.bfloat16.itemsize
        activations = saved_activations(shape, sum(work.sequences), width, variant.checkpointing)
        found["activations_gib"] = activations / GIB
    return found


def roofline(config: PPOConfig, mean_length: int, prompt: int, rates: Rates) -> dict[str, Any]:
    """Every phase and variant of a configuration.

    Raises:
        UserError: a model that cannot be counted, or sequences that are none.
    """
    if not config.actor_rollout_ref.model.use_remove_padding:
        raise UserError("only packed sequences are modelled: set actor_rollout_ref.model.use_remove_padding=true")
    memory, model = PhaseMemory.from_config(config, float("inf")), config_of(config.actor_rollout_ref.model.path)
    if memory is None:
        raise UserError(f"no estimate for {config.actor_rollout_ref.model.path}: its kind of model is not counted")
    if not 0 < prompt < mean_length:
        raise UserError(f"--prompt {prompt} must be above 0 and below --mean-length {mean_length}")
    works = {
        name: Work(model, _sequences(memory.tokens(phase), mean_length, prompt), prompt, entropy, name == "update")
        for name, phase, entropy in (
            ("old log-prob", "log-prob", True),
            ("reference", "reference", False),
            ("update", "update", config.actor_rollout_ref.actor.entropy_coeff != 0),
        )
    }
    return {
        name: {one.name: modelled(work, one, rates) for one in variants() if one.checkpointing or work.trains}
        for name, work in works.items()
    }


def _sequences(tokens: int, length: int, prompt: int) -> list[int]:
    """As long as told, and a shorter one for the rest."""
    whole, rest = divmod(tokens, length)
    return [length] * whole + ([rest] if rest > prompt else [])


def recipe_config(recipe: str, overrides: list[str]) -> PPOConfig:
    """What a recipe's script composes.

    Raises:
        UserError: an unknown recipe, or an override that is none.
    """
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe} is unknown, use one of {', '.join(RECIPES)}")
    command = ["bash", str(ROOT / f"scripts/run_{recipe}_node.sh"), "--cfg", *overrides]
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": ":".join(paths)})
    if ended.returncode:
        raise UserError(ended.stderr.strip().rpartition("error: ")[2])
    return validated(PPOConfig, OmegaConf.create(ended.stdout), YAML)


def tables(result: dict[str, Any]) -> str:
    """Markdown: milliseconds by kind."""
    heads = ["phase", "variant", *KINDS, "sum", "MFU", "activations, GiB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for phase, found in result["phases"].items():
        for variant, figures in found.items():
            cells = [f"{1e3 * seconds:,.0f}" for seconds in (*figures["seconds"].values(), figures["sum"])]
            activations = f"{figures['activations_gib']:.1f}" if "activations_gib" in figures else ""
            lines.append(f"| {' | '.join([phase, variant, *cells, format(figures['mfu'], '.1%'), activations])} |")
    return "\n".join(lines) + "\n"


@exit_on_user_error
def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the trainer")] = None,
    recipe: Annotated[str, typer.Option(help=f"one of {', '.join(RECIPES)}")] = "single",
    mean_length: Annotated[int | None, typer.Option(help="tokens of a sequence; half of the longest one")] = None,
    prompt: Annotated[int, typer.Option(help="tokens of them that are the prompt's")] = 256,
    peak_tflops: Annotated[float, typer.Option(help="of matrix products, what MFU refers to")] = 989,
    gemm_share: Annotated[float, typer.Option(help="of the peak that large products reach")] = 0.72,
    attention_tflops: Annotated[tuple[float, float], typer.Option(help="forward, backward")] = (380, 300),
    attention_3_tflops: Annotated[tuple[float, float], typer.Option(help="of FlashAttention-3")] = (600, 480),
    bandwidth_tb: Annotated[float, typer.Option(help="10^12 bytes/s of memory")] = 3.35,
    bandwidth_share: Annotated[float, typer.Option(help="of them that kernels reach")] = 0.8,
    latency_us: Annotated[float, typer.Option(help="of the shortest operation")] = 4,
    out: Annotated[Path | None, typer.Option(help="JSON file; bench/results/roofline.json")] = None,
) -> None:
    """Model a recipe and write the figures."""
    config = recipe_config(recipe, overrides or [])
    rates = Rates(
        peak=peak_tflops * 1e12,
        gemm=gemm_share * peak_tflops * 1e12,
        attention=tuple(rate * 1e12 for rate in attention_tflops),
        attention_3=tuple(rate * 1e12 for rate in attention_3_tflops),
        bandwidth=bandwidth_share * bandwidth_tb * 1e12,
        latency=latency_us / 1e6,
    )
    length = mean_length or config.data.longest // 2
    result = {
        "benchmark": "roofline",
        "modelled": True,
        "model": Path(config.actor_rollout_ref.model.path).name,
        "recipe": recipe,
        "overrides": overrides or [],
        "mean_length": length,
        "prompt": prompt,
        "rates": asdict(rates),
        "phases": roofline(config, length, prompt, rates),
    }
    sys.stdout.write(tables(result) + "\n")
    report(rounded(result), out or ROOT / "bench/results/roofline.json")


if __name__ == "__main__":
    typer.run(main)
