"""The kernels that everything else stands on: a product, attention over packed sequences, and the LM head's."""

from __future__ import annotations

import shutil
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from verl.bringup.step import Context, require, seconds, step
from verl.models.log_probs import LMHead, token_log_probs
from xbai.engine.packed_attention import Packing, SharedPrefixPacking, packed_attention

SIZE = {True: 8192, False: 256}
REPEATS = 10
PRODUCT_ERROR = 0.01
HEADS, KV_HEADS = 12, 2
ATTENTION_ERROR, LOG_PROB_ERROR, GRADIENT_ERROR = 0.03, 1e-3, 0.006
MEANS = (
    "The kernel that computes packed sequences here (flash_attn's where it is installed, else PyTorch's varlen_attn) "
    "gives other numbers than plain attention in float32; see xbai/engine/packed_attention.py `_varlen`. Until it is "
    "mended train with model.use_remove_padding=false and leave the score service off. "
)


@step(
    means="This build of torch cannot run kernels here. `nvidia-smi` names the driver: CUDA 13 builds need 580 or "
    "newer, CUDA 12 ones 525. Update the driver, or install another build of torch.",
    quick=True,
)
def torch_runs_kernels(context: Context) -> str:
    """A matrix product in bfloat16 that is right, and its speed."""
    if context.on_gpu:
        require(torch.cuda.is_available(), "torch.cuda.is_available() is false, although there is a GPU")
    size = SIZE[context.on_gpu]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 512, generator=generator).bfloat16() for _ in range(2))
    wanted = left.double() @ right.double().T
    found = (left.to(context.device) @ right.to(context.device).T).cpu().double()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    require(error < PRODUCT_ERROR, f"a product in bfloat16 is {error:.3g} off, relative to its largest value")
    square = torch.randn(size, size, device=context.device, dtype=torch.bfloat16)
    for _ in range(2):
        square @ square
    tflops = 2 * size**3 / seconds(lambda: square @ square, REPEATS) / 1e12
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if context.on_gpu else "CPU"
    return f"{name}, torch {torch.__version__}: relative error {error:.2g}, {tflops:.3g} TFLOP/s in bfloat16"


@step(
    means="No C compiler: Triton's kernels, torch.compile (use_fused_kernels) and vLLM's graphs cannot be built. "
    "`apt install gcc g++`. nvcc and ninja are wanted by FlashInfer alone, which is switched off without them.",
    quick=True,
)
def compilers(context: Context) -> str:
    """Programs that build kernels at run time; only a C compiler is indispensable."""
    found = [name for name in ("gcc", "g++", "clang", "nvcc", "ninja") if shutil.which(name)]
    require(any(name in found for name in ("gcc", "g++", "clang")), "no C compiler in PATH")
    return f"found {', '.join(found)}"


@step(means=MEANS + "Here grouped-query heads of packed training rows are wrong.", quick=True)
def attention_grouped_heads(context: Context) -> str:
    """12 query and 2 key heads, sequences of 1 to 700 tokens, heads of 128 and of 64."""
    head_dims = (128, 64) if context.on_gpu else (32,)
    return _figure(*(_compare(context, [1, 5, 700, 64], head_dim) for head_dim in head_dims))


@step(means=MEANS + "Here the window of models with sliding attention is.", quick=True)
def attention_window(context: Context) -> str:
    """A sliding window of 128 tokens."""
    return _figure(_compare(context, [300, 17, 512], window=128))


@step(
    means=MEANS + "Here prefixes that texts share are: the score service scores wrongly. Where there are more keys "
    "than queries, the causal mask must be aligned to the end of the keys.",
    quick=True,
)
def attention_shared_prefixes(context: Context) -> str:
    """Sequences that begin with the first 40 tokens of the first one, and so have more keys than queries."""
    return _figure(_compare(context, [90, 30, 55], shared=40))


@step(
    means="The LM head's products of bfloat16 numbers, which are summed and kept in float32 (torch.mm and torch.addmm "
    "with out_dtype), are wrong or not there: every training step depends on them. See verl/models/log_probs.py; "
    "model.head_dtype=model does without the first of them.",
    quick=True,
)
def lm_head(context: Context) -> str:
    """The LM head of 1.5B on tokens of both signs of advantage, in chunks the last of which is shorter."""
    vocabulary, width, tokens = (151_936, 1536, 2000) if context.on_gpu else (5000, 64, 200)
    generator = torch.Generator(context.device).manual_seed(0)
    linear = nn.Linear(width, vocabulary, bias=False, device=context.device, dtype=torch.bfloat16)
    hidden = torch.randn(tokens, width, generator=generator, device=context.device).bfloat16()
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=context.device)
    advantages = torch.randn(tokens, generator=generator, device=context.device)

    def results(head: nn.Linear, hidden: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden.requires_grad_()
        of_labels = token_log_probs(hidden, LMHead.of(head, torch.float32), labels, logits_per_chunk=chunk * vocabulary)
        log_probs = of_labels.log_probs
        of_hidden, of_weight = torch.autograd.grad((log_probs * advantages).sum(), (hidden, head.weight))
        return log_probs.detach(), of_hidden, of_weight

    found = results(linear, hidden, chunk=tokens // 3)
    wanted = results(linear.float(), hidden.detach().float(), chunk=tokens)
    off = float((found[0] - wanted[0]).abs().max())
    require(off < LOG_PROB_ERROR, f"log-probs are up to {off:.3g} off; at most {LOG_PROB_ERROR}")
    errors = [
        float((one.float() - other).norm() / other.norm()) for one, other in zip(found[1:], wanted[1:], strict=True)
    ]
    require(max(errors) < GRADIENT_ERROR, f"gradients are {max(errors):.3g} off; at most {GRADIENT_ERROR}")
    return f"log-probs within {off:.2g} of float32, gradients within {max(errors):.2%}"


def _figure(*errors: tuple[float, float]) -> str:
    output, gradient = (max(column) for column in zip(*errors, strict=True))
    require(output < ATTENTION_ERROR, f"outputs are up to {output:.3g} off; at most {ATTENTION_ERROR}")
    require(gradient < ATTENTION_ERROR, f"gradients are {gradient:.3g} of the largest off; at most {ATTENTION_ERROR}")
    return f"outputs within {output:.2g} of float32, gradients within {gradient:.2g} of the largest"


def _compare(
    context: Context, lengths: list[int], head_dim: int = 64, window: int | None = None, shared: int = 0
) -> tuple[float, float]:
    """Largest error of outputs, and of gradients relative to the largest gradient.

    `lengths` are tokens of each sequence that are its own; to `shared` of the first one's all others attend as well.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    drawn = [torch.randn(1, heads, tokens, head_dim, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    fast = [x.to(context.device, torch.bfloat16).requires_grad_() for x in drawn]
    exact = [x.detach().float().requires_grad_() for x in fast]
    module = torch.nn.Module()
    packing = _packing(context.device, lengths, shared)
    query, key, value = fast
    output = packed_attention(module, query, key, value, None, packing=packing, sliding_window=window)[0]
    query, key, value = exact
    wanted = _plain(query, key, value, _paths(lengths, shared), lengths, window)
    weights = torch.randn(output.shape, generator=generator).to(context.device)
    gradients = torch.autograd.grad((output.float() * weights).sum(), fast)
    wanted_gradients = torch.autograd.grad((wanted * weights).sum(), exact)
    off = max(
        float((one.float() - other).abs().max() / other.abs().max())
        for one, other in zip(gradients, wanted_gradients, strict=True)
    )
    return float((output.float() - wanted).detach().abs().max()), off


def _paths(lengths: list[int], shared: int) -> list[list[int]]:
    """Which of the tokens each sequence attends to, its own last."""
    own = [list(range(end - length, end)) for end, length in zip(accumulate(lengths), lengths, strict=True)]
    return [own[0], *(own[0][:shared] + tokens for tokens in own[1:])]


def _packing(device: str, lengths: list[int], shared: int) -> Packing:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    if not shared:
        return Packing(ends, max(lengths))
    paths = _paths(lengths, shared)
    of_keys = [len(path) for path in paths]
    key_ends = torch.tensor([0, *accumulate(of_keys)], dtype=torch.int32, device=device)
    index = torch.tensor([token for path in paths for token in path], device=device)
    return SharedPrefixPacking(ends, max(lengths), index, key_ends, max(of_keys))


def _plain(
    query: Tensor, key: Tensor, value: Tensor, paths: list[list[int]], lengths: list[int], window: int | None
) -> Tensor:
    """[1, n, heads, d]: scores, mask and softmax written out, each sequence alone."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    outputs = []
    for path, length in zip(paths, lengths, strict=True):
        own = torch.tensor(path[-length:], device=query.device)
        seen = torch.tensor(path, device=query.device)
        scores = query[0, :, own] @ key[0, :, seen].transpose(1, 2) / query.shape[-1] ** 0.5
        distance = torch.arange(len(path))[-length:, None] - torch.arange(len(path))
        visible = (distance >= 0) & (distance < (window or len(path)))
        scores = scores.masked_fill(~visible.to(query.device), float("-inf"))
        outputs.append(functional.softmax(scores, dim=-1) @ value[0, :, seen])
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]
