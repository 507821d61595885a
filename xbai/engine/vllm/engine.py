"""The fast engine: vLLM inside this process, with continuous batching, prefix caching and weight updates in place."""

from __future__ import annotations

import gc
import logging
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from xbai.engine.base import Engine, EnginePart
from xbai.engine.files import LM_HEAD, ModelOptions
from xbai.engine.fused_scores import LOG_PROB, STEP_LOGIT, FusedHead, obstacle
from xbai.engine.sample import Completion, Sample
from xbai.engine.scorer import Scorer, head_shapes
from xbai.engine.vllm.start import check_devices, dtype_name, engine_arguments, start
from xbai.engine.weight_check import HeldWeight
from xbai.engine.weight_files import check_weights
from xbai.errors import UserError
from xbai.sprm import SPRMConfig, StepRule, load_sprm_config
from xbai.sprm.steps import step_scores

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase

logger = logging.getLogger(__name__)


class VLLMEngine(Engine):
    """vLLM driven sample by sample.

    Where torch.distributed is initialised already (a trainer), each rank gets an engine of its own, or with
    `tensor_parallel_size` its part of one: so many consecutive ranks then make the same calls in the same order. All
    ranks must construct theirs at the same time. Elsewhere vLLM initialises it, so construct engines after your process
    group; of several engines in one process the first, which ends it, is to be closed last.

    Generated tokens are scored in the forward pass that samples them where `fused_scores.obstacle` names none, else by
    a second one. Other sequences always need `Scorer`'s copy of the backbone, loaded when the first of them comes.

    Args:
        options: what to load; an LM head that is itself quantised needs `head_dtype` `model`.
        sprm_config: instead of `with_scores` the form of a head that is not in the folder; `update_weights` is to bring
            its weights before scores are asked for. Only where `fused_scores.obstacle` names none.
        enable_sleep_mode: have `sleep` free memory, at most one engine of a process at a time; by default among the
            ranks of a trainer. A CPU engine never sleeps.
        **arguments: any other field of vLLM's `EngineArgs` (`gpu_memory_utilization`, `load_format`, ...), None for its
            default: of `max_num_seqs` 128 on CPU, and what vLLM chooses for a GPU of this size, of
            `max_num_batched_tokens` likewise; of `enforce_eager` True on CPU, where compiling costs a minute; of
            `kv_cache_memory_bytes` on CPU what `max_num_seqs` full samples need, at most 4 GiB.
    """

    def __init__(
        self,
        options: ModelOptions,
        *,
        sprm_config: SPRMConfig | None = None,
        enable_sleep_mode: bool | None = None,
        **arguments: Any,
    ) -> None:
        check_devices(arguments)
        super().__init__(options)
        if arguments.get("load_format", "auto") == "auto":
            check_weights(options.model_path, self._config)
        self._fused_head = self._load_head(sprm_config, arguments)
        if self._fused_head is not None:
            # Also made here: its mistakes are the user's, and vLLM's processes would hide them in tracebacks.
            self._fused_shapes = head_shapes(self._fused_head.build(self._config.hidden_size))
            arguments |= self._fused_head.engine_arguments(self._config, arguments)
        # All of vLLM's models hand their LM head to the layer that reads this.
        arguments["hf_overrides"] = {"head_dtype": dtype_name(self._logits_dtype), **arguments.get("hf_overrides", {})}
        self._weights_have_changed = False
        # vLLM's own; it forgets one when it has ended.
        self._states: WeakValueDictionary[Sample, Any] = WeakValueDictionary()
        self._on_cpu = not torch.cuda.is_available()
        self._owns_process_group = not torch.distributed.is_initialized()
        arguments |= {
            "model": str(options.model_path),
            "max_model_len": self.max_model_len,
            "enable_sleep_mode": None if self._on_cpu else enable_sleep_mode,
            "trust_remote_code": options.trust_remote_code,
        }
        self._llm = start(engine_arguments(self._config, self._dtype, arguments))
        if not self._owns_process_group:
            # vLLM's own clean-up, also on garbage collection and exit, would destroy the trainer's process group.
            self._llm.engine_core._finalizer.detach()
        self._speculates = bool(arguments.get("speculative_config"))
        if not self._speculates:
            from xbai.engine.vllm.sampler import use_engine_sampler

            self._llm.collective_rpc(use_engine_sampler)
        self.max_num_seqs = self._llm.vllm_config.scheduler_config.max_num_seqs

    @property
    def step_rule(self) -> StepRule | None:
        """The rule that finds the steps, None without a score head."""
        return self._fused_head.sprm_config.step_rule if self._fused_head else super().step_rule

    def sleep(self, level: int = 2) -> None:
        """Free KV cache and weights on the accelerator; after `wake_up` from level 2, update the weights.

        Raises:
            UserError: an engine on a GPU that was not loaded to sleep.
        """
        if self._on_cpu:
            return
        if not self._llm.vllm_config.model_config.enable_sleep_mode:
            raise UserError("sleep: this engine's memory cannot be freed; load it with enable_sleep_mode=True")
        self._llm.sleep(level=level)

    def wake_up(self, parts: Sequence[EnginePart] | None = None) -> None:
        """Allocate again what `sleep` freed, or of `weights` and `kv_cache` only the named parts."""
        if not self._on_cpu:
            # vLLM's memory does not come from torch's cache, which may hold what is free.
            torch.cuda.empty_cache()
            self._llm.wake_up(None if parts is None else list(parts))

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Have `on_failure` called, from a thread of its own, as soon as a worker process has ended, also by `close`.

        vLLM's own callback comes only once the other workers have been waited for. From here on workers ignore the
        signals that a terminal or a service manager sends to all processes of a service: they end with this one.
        """
        if not self._worker_processes:
            return
        self._llm.collective_rpc(_ignore_stop_signals)
        ends = [worker.proc.sentinel for worker in self._worker_processes]

        def wait_for_an_end() -> None:
            multiprocessing.connection.wait(ends)
            on_failure()

        threading.Thread(target=wait_for_an_end, name="workers", daemon=True).start()

    def close(self) -> None:
        """Shut vLLM down; a torch.distributed process group that was there before the engine stays."""
        if self._owns_process_group:
            self._llm.engine_core.shutdown()
        else:
            core = self._llm.engine_core.engine_core
            core.model_executor.shutdown()
            core.scheduler.shutdown()
            gc.unfreeze()
        self._llm = self.scorer = None
        gc.collect()
        if not self._on_cpu:
            torch.cuda.empty_cache()

    def _load_head(self, sprm_config: SPRMConfig | None, arguments: Mapping[str, Any]) -> FusedHead | None:
        """The head that vLLM's model is to have; where it cannot have the one that is wanted, the scorer gets it."""
        options = self._options
        if not options.with_scores:
            return None if sprm_config is None else FusedHead(sprm_config, folder=None)
        if (reason := obstacle(self._config, arguments)) is None:
            head = load_sprm_config(options.model_path, self.tokenizer, options.lang)
            return FusedHead(head, str(options.model_path))
        logger.warning("step scores will take a second forward pass: %s", reason)
        self.scorer = self._load_scorer()
        return None

    def _load_scorer(self) -> Scorer:
        options = self._options
        return Scorer.from_folder(
            options.model_path, dtype=options.dtype, lang=options.lang, trust_remote_code=options.trust_remote_code
        )

    def _enqueue(self, sample: Sample) -> None:
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs.engine import tokens_input

        from xbai.engine.vllm.sampler import ColumnReader

        if self._speculates and sample.params.log_probs:
            raise UserError("log_probs: vLLM's speculative decoding has none of logits / temperature; leave one out")
        prompt = tokens_input(sample.prompt_ids)
        try:
            request_id = self._llm.add_request(sample.key, prompt, self._vllm_params(sample))
        except (ValueError, VLLMValidationError) as error:
            raise UserError(f"vLLM refuses the request: {error}") from error
        state = self._states[sample] = self._llm.output_processor.request_states[request_id]
        if columns := self._columns(sample):
            state.logprobs_processor = ColumnReader(columns)

    def _drop(self, samples: list[Sample]) -> None:
        self._llm.abort_request([sample.key for sample in samples])

    def _advance(self) -> list[tuple[Sample, Completion]]:
        finished = [output for output in self._llm.step() if output.finished]
        for output in finished:
            self.prompt_tokens += len(output.prompt_token_ids)
            self.cached_prompt_tokens += output.num_cached_tokens or 0
        return [self._finish(self._unfinished[output.request_id], output) for output in finished]

    def token_ids(self, sample: Sample) -> Sequence[int]:
        """See `Engine`."""
        state = self._states.get(sample)
        return () if state is None else state.detokenizer.output_token_ids

    def _so_far(self, sample: Sample) -> Completion:
        completion = Completion(list(self.token_ids(sample)), "", "pruned")
        if (state := self._states.get(sample)) is not None:
            self._read_columns(sample, completion, state.logprobs_processor.logprobs)
        return completion

    def _finish(self, sample: Sample, request: Any) -> tuple[Sample, Completion]:
        (output,) = request.outputs
        token_ids = list(output.token_ids)
        completion = Completion(token_ids, self._response_text(sample, token_ids), output.finish_reason)
        completion.cached_prompt_tokens = request.num_cached_tokens or 0
        if output.stop_reason in sample.params.stop_token_ids and output.stop_reason not in sample.end_ids:
            # vLLM does not look for stop strings in the text of the token.
            is_cut = completion.text != self.detokenize(token_ids)
            completion.finish_reason = "stop" if is_cut else "stop_token"
        self._read_columns(sample, completion, output.logprobs)
        return sample, completion

    def _read_columns(self, sample: Sample, completion: Completion, values: Any) -> None:
        if not (columns := self._columns(sample)):
            return
        if sample.params.log_probs:
            completion.log_probs = values[LOG_PROB::columns]
        if self._fused_head is not None and sample.return_scores:
            rule = self._fused_head.sprm_config.step_rule
            completion.step_scores, completion.step_ends = step_scores(
                sample.prompt_ids, completion.token_ids, values[STEP_LOGIT::columns], rule
            )

    def _columns(self, sample: Sample) -> int:
        """How many of the sampler's columns a sample needs, one after the other for each token."""
        if sample.params.log_probs:
            return LOG_PROB + 1
        return STEP_LOGIT + 1 if self._fused_head is not None and sample.return_scores else 0

    def require_scorer(self) -> Scorer:
        """See `Engine`; it holds another copy of the backbone."""
        if self.scorer is None and self._fused_head is not None:
            ranks = self._llm.vllm_config.parallel_config.tensor_parallel_size
            if self._weights_have_changed and ranks > 1:
                raise UserError(
                    f"score: each of the {ranks} ranks holds a part of the weights that update_weights brought; score "
                    "once before the first update, and the scorer takes the whole of them too"
                )
            scorer = self._load_scorer()
            if self._weights_have_changed:
                for name, held in self._held_weights().items():
                    scorer.load_weight(name, next(iter(held.copies())))
            self.scorer = scorer
        return super().require_scorer()

    def _load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._check_one_process()
        if self._config.tie_word_embeddings:
            weights = _with_lm_head(weights)
        self._weights_have_changed = True
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, so that it would go on with states of the old weights")

    def _held_weights(self) -> Mapping[str, HeldWeight]:
        from xbai.engine.vllm.weights import held_weights

        self._check_one_process()
        return self._llm.collective_rpc(held_weights)[0]

    def _check_one_process(self) -> None:
        if self._worker_processes:
            raise UserError(
                f"update_weights: {len(self._worker_processes)} processes of vLLM's hold this engine's weights "
                "(tensor_parallel_size), and only an engine of ranks that share a process group takes new ones"
            )

    @property
    def _worker_processes(self) -> Sequence[Any]:
        """Handles of the processes that vLLM started for the model; none where it runs in this one."""
        return getattr(self._llm.engine_core.engine_core.model_executor, "workers", ())

    def _vllm_params(self, sample: Sample) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = sample.params
        # To be honoured by this engine's sampler, save where it is vLLM's own.
        options = {"repetition_penalty": params.repetition_penalty, "seed": sample.seed}
        return SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            stop=list(params.stop),
            stop_token_ids=[*params.stop_token_ids, *sample.end_ids],
            # It is for finding stop strings alone.
            detokenize=bool(params.stop),
            skip_special_tokens=not self.detokenize.keeps_special,
            ignore_eos=params.ignore_eos,
            logprobs=columns - 1 if (columns := self._columns(sample)) else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **(options if self._speculates else {"extra_args": options}),
        )


def _ignore_stop_signals(worker: WorkerBase) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _with_lm_head(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Send a tied LM head too: on CPU vLLM keeps a packed copy of it, which the embedding alone leaves stale."""
    for name, tensor in weights:
        if name != LM_HEAD:
            yield name, tensor
        if name == "model.embed_tokens.weight":
            yield LM_HEAD, tensor
