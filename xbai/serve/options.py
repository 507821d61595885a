"""What the services are asked to serve, where, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import typer

from xbai.api_key import ApiKeyOptions

Port = Annotated[int, typer.Option(min=0, max=65535)]
Count = Annotated[int, typer.Option(min=1)]
Effort = Literal["none", "minimal", "low", "medium", "high"]
ReasoningField = Literal["reasoning", "reasoning_content"]
OptionalCount = Annotated[int | None, typer.Option(min=1)]


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """What both services are asked."""

    model_path: str
    """A Hugging Face model folder."""
    ip: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every interface, :: also by IPv6."""
    port: Port
    """0 picks a free one."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    max_model_len: Annotated[int | None, typer.Option(min=2)] = None
    """Longest prompt plus response."""
    max_pending: Count
    """Responses (policy) or texts (score) that are queued; beyond it 429."""
    request_timeout: Annotated[float, typer.Option(min=0.001)] = 3600.0
    """Seconds to an answer; then 504."""
    max_body_mb: Count = 16
    """Largest request body in MiB; beyond it 413."""
    shutdown_timeout: Annotated[float, typer.Option(min=0)] = 60.0
    """Seconds to finish after SIGTERM."""
    log_format: str = "json"
    """json (an object a line) or text."""
    api_key: ApiKeyOptions = field(default_factory=ApiKeyOptions)


@dataclass(frozen=True, kw_only=True)
class OpenAIOptions:
    """Of the routes for OpenAI's clients."""

    effort: Annotated[Effort | None, typer.Option(metavar="EFFORT")] = None
    """Reasoning effort of requests that name none: none, minimal, low, medium or high; by default low, and none for a
    model without a score head."""
    effort_budget: str | None = None
    """Budget of low, medium and high, as stop:0.95: of their candidates those are written that it wants."""
    reasoning_field: Annotated[ReasoningField, typer.Option(metavar="NAME")] = "reasoning"
    """What messages call their thinking: reasoning, or reasoning_content for clients that know that name."""
    served_model_name: str | None = None
    """What clients call the model; by default its folder's name."""
    openwebui_status: bool = False
    """Streams also tell Open WebUI how far the candidates are."""
    page: Annotated[bool, typer.Option("--page/--no_page")] = True
    """Show the page at /."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ServiceOptions):
    """Of the service that generates responses."""

    port: Port = 8000
    max_pending: Count = 4096
    engine: str = "auto"
    """vllm, hf, or auto."""
    with_scores: Annotated[bool | None, typer.Option("--with_scores/--no_scores")] = None
    """Offer scores with the responses; by default where score_module.pt exists."""
    tensor_parallel_size: OptionalCount = None
    """GPUs that share the model (vllm)."""
    gpu_memory_utilization: Annotated[float | None, typer.Option(min=0.01, max=1)] = None
    """Share of a GPU's memory to take (vllm)."""
    replicas: OptionalCount = None
    """Copies of the model behind the port, each a process with tensor_parallel_size GPUs of its own; what dies is
    started again."""
    openai: OpenAIOptions = field(default_factory=OpenAIOptions)


@dataclass(frozen=True, kw_only=True)
class OnRayOptions(PolicyOptions):
    """Of the same service on a Ray cluster."""

    max_replicas: OptionalCount = None
    """Let the number of copies follow the load, from --replicas (1) to this."""
    target_candidates: Count = 128
    """Candidates that each copy is to be at, with --max_replicas."""
    cpus_per_replica: Annotated[float, typer.Option(min=0)] = 1.0
    """CPUs that Ray sets aside for each copy."""
    gpus_per_replica: Annotated[float | None, typer.Option(min=0)] = None
    """And GPUs; by default tensor_parallel_size (1) where the cluster, or else this machine, has any."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ServiceOptions):
    """Of the service that scores texts."""

    port: Port = 8001
    max_pending: Count = 1024
    score_model_dim: int | None = None
    """The model's hidden size, checked where given."""
    lang: str | None = None
    """Step rule: en or zh; by default the one that travels with the model."""
    max_batch_tokens: OptionalCount = None
    """Most tokens of one forward pass; by default what suits the device."""
