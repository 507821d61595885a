"""What a configuration will take of a GPU's memory, phase by phase, from sizes alone.

Of the tensors that count: those that grow with the model, the tokens of a micro-batch or the vocabulary. What a decoder
layer saves is counted for transformers' own modules; fused kernels save less. `verl/tests/test_dry_run.py` compares the
formulas with what torch allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.trainer.config.schema import FrozenPlacement, OptimConfig, TrainedPlacement
from verl.trainer.planning.model_shapes import ModelShape
from verl.workers.placed_model import Dtypes

GIB = 2**30
# Of a weight in all checkpoints that are worth an estimate.
CHECKPOINT_BYTES = 2

# Bytes of one logit of a chunk: forward (with entropies), and where the backward pass computes it again.
LOGIT_FORWARD, LOGIT_BACKWARD = 12, 24
# A second-moment state in 8 bits, its scale and its sign map: per parameter and moment.
EIGHT_BIT_STATE = 1.02
# What torch, CUDA and NCCL keep for themselves, and what lies between blocks.
CONTEXT_BYTES, FRAGMENTATION = 2 * GIB, 0.05
# Of the engines: the hf engine's KV cache in tokens, and the most that vLLM's takes on CPU.
HF_CACHE_SLOTS, CPU_CACHE_BYTES = 131072, 4 * GIB
# vLLM's graphs of up to 512 tokens: it reports 0.1 to 1.1 GiB, more for larger models.
CUDA_GRAPHS_BYTES = 1.5 * GIB

Components = dict[str, float]


@dataclass(frozen=True)
class Placement:
    """One sharded model on one GPU, as `PlacedModel` keeps it."""

    shape: ModelShape
    config: FrozenPlacement
    shards: int
    """GPUs that share one copy."""
    compute: int
    """Bytes of a weight as it is multiplied."""
    stored: int
    """Bytes of a weight as it is kept: in float32, or as in the checkpoint where it is not trained."""
    states: float
    """Bytes of optimiser state for one parameter, 0 for a model that is not trained."""
    has_lm_head: bool = True
    """A critic has none."""
    adapters: int = 0
    """Parameters of adapters, where they are trained and all else is frozen; 0: all is trained, or nothing."""
    adapter_bytes: int = 0
    """Bytes of one of them as it is kept."""

    @classmethod
    def from_config(
        cls,
        shape: ModelShape,
        fsdp_config: FrozenPlacement,
        optim: OptimConfig | None,
        world: int,
        on_gpu: bool,
        has_lm_head: bool = True,
        adapters: int = 0,
    ) -> Placement:
        """As `PlacedModel` reads `fsdp_config`, and `build_optimizer` `optim` (None: not trained)."""
        size = fsdp_config.fsdp_size
        trained, compute = (dtype.itemsize for dtype in Dtypes.from_config(fsdp_config, on_gpu))
        stored, states = CHECKPOINT_BYTES if optim is None or adapters else trained, 0.0
        if optim is not None:
            states = 2 * EIGHT_BIT_STATE if "8bit" in optim.name else 2.0 * trained
        shards = size if size > 0 else world
        return cls(shape, fsdp_config, shards, compute, stored, states, has_lm_head, adapters, trained)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.shape.parameters - self.shape.embedding_parameters + self._outer

    @property
    def weights(self) -> float:
        """Bytes of this GPU's shard."""
        return (self.parameters * self.stored + self.adapters * self.adapter_bytes) / self.shards

    @property
    def trained_weights(self) -> float:
        """Bytes of what of it is trained; gradients take as many."""
        return self.adapters * self.adapter_bytes / self.shards if self.adapters else self.weights

    @property
    def optimizer(self) -> float:
        """Bytes of the optimiser's state for it."""
        return (self.adapters or self.parameters) * self.states / self.shards

    def resident(self, in_use: bool, with_optimizer: bool = False) -> tuple[float, float]:
        """Bytes of weights and of optimiser state on the GPU, in a phase that uses the model or in another one's."""
        if self.config.offload_policy:
            return 0.0, 0.0
        weights = self.weights if in_use or not self.config.param_offload else 0.0
        away = isinstance(self.config, TrainedPlacement) and self.config.optimizer_offload and not with_optimizer
        return weights, 0.0 if away else self.optimizer

    @property
    def _outer(self) -> int:
        return self.shape.embedding_parameters * (1 if self.has_lm_head or self.shape.tied else 0)

    def gathered(self, in_flight: int = 3) -> float:
        """Bytes of whole weights: the LM head, layers that are not resharded, or those `in_flight`; of these there are
        in a forward pass the one that computes, the next one's all-gather, and the buffer that it arrives in."""
        layers = in_flight if self.config.reshard_after_forward else self.shape.layers
        return self.compute * (self._outer + layers * (self.shape.layer_parameters + self._layer_adapters))

    @property
    def _layer_adapters(self) -> float:
        return self.adapters / self.shape.layers

    def gathered_in_backward(self) -> float:
        """The same while a layer's gradients are made and reduced in float32, the LM head's being there already."""
        if self.adapters:
            return self.gathered() + (self.compute + 4) * self._layer_adapters
        return self.gathered() + self.compute * self._outer + (self.compute + 4) * self.shape.layer_parameters

    def gathered_at_end(self) -> float:
        """The same when the gradients of LM head and embedding are reduced, after all activations are gone."""
        if self.adapters:
            return self.gathered(in_flight=0)
        pieces = 1 if self.shape.tied or not self.has_lm_head else 2
        return pieces * self.shape.embedding_parameters * (2 * self.compute + 4)


def layer_saved(shape: ModelShape, width: int) -> int:
    """Bytes that the backward pass of a decoder layer needs of each token, at `width` bytes a number."""
    norms = 2 * (4 + 2 * width) * shape.hidden
    attention = 2 * (shape.query_size + shape.kv_size) * width + 4 * shape.heads
    qk_norms = (4 + width) * (shape.query_size + shape.kv_size) * shape.qk_norm
    return norms + attention + qk_norms + 4 * shape.mlp * width


def saved_activations(shape: ModelShape, tokens: int, width: int, checkpointing: bool) -> float:
    """Bytes that a forward pass leaves for the backward pass: each layer's input alone, with checkpointing."""
    layer = shape.hidden * width if checkpointing else layer_saved(shape, width)
    return tokens * (shape.layers * layer + (4 + width) * shape.hidden)


def backward_work(shape: ModelShape, tokens: int, width: int, checkpointing: bool) -> float:
    """Bytes that the backward pass of one layer takes on top: its activations again, and gradients on their way."""
    again = layer_saved(shape, width) if checkpointing else 0
    return tokens * (again + (2 * shape.mlp + 2 * shape.hidden) * width)


def forward_work(shape: ModelShape, tokens: int, width: int) -> float:
    """Bytes that a layer takes at its widest, MLP or attention, in a forward pass that saves nothing."""
    mlp = (3 * shape.mlp + 5 * shape.hidden) * width
    attention = (2 * shape.hidden + 4 * shape.query_size + 2 * shape.kv_size) * width
    return tokens * max(mlp, attention + 5 * shape.query_size * shape.qk_norm)


def attention_mask(tokens: int, length: int, width: int) -> float:
    """Bytes of the mask of padded rows of `length`, bool and as a bias."""
    return tokens * length * (1.0 + width)


def training_peak(
    model: Placement, tokens: int, length: int, checkpointing: bool, packed: bool, logits: int
) -> Components:
    """Transient memory of an update at its highest: in a chunk of logits, a layer's backward pass, or at the end.

    The optimiser's step takes nothing on top: on GPUs it is one kernel that works in place (`build_optimizer`).
    """
    shape, width = model.shape, model.compute
    saved = {"activations": saved_activations(shape, tokens, width, checkpointing)}
    if not packed:
        saved["attention mask"] = attention_mask(tokens, length, width)
    # The LM head's gradient is summed over chunks in float32, beside the one in 16 bits that is counted as gathered.
    is_summed = logits and width == 2 and not model.adapters
    summed = {"LM head's gradient": 4.0 * shape.embedding_parameters} if is_summed else {}
    moments: list[Components] = [
        {"gathered weights": model.gathered(), "logits chunk": LOGIT_BACKWARD * logits, **summed, **saved},
        {
            "gathered weights": model.gathered_in_backward(),
            "backward of a layer": backward_work(shape, tokens, width, checkpointing),
            **saved,
        },
        {"gathered weights": model.gathered_at_end()},
    ]
    return max(moments, key=lambda moment: sum(moment.values()))


def forward_peak(model: Placement, tokens: int, length: int, packed: bool, logits: int) -> Components:
    """Transient memory of a forward pass without gradients at its highest."""
    shape, width = model.shape, model.compute
    common = {"gathered weights": model.gathered()}
    if not packed:
        common["attention mask"] = attention_mask(tokens, length, width)
    hidden = tokens * shape.hidden * width
    moments = [
        {**common, "activations": forward_work(shape, tokens, width)},
        {**common, "activations": hidden, "logits chunk": LOGIT_FORWARD * logits},
    ]
    return max(moments, key=lambda moment: sum(moment.values()))
