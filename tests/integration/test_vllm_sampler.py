"""Penalties and seeds of requests that come, move, go, wait and return, under both ways to schedule them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from xbai.engine import Engine, SamplingParams, load_engine
from xbai.engine.seeded_draw import uniforms

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CACHE_BLOCKS, BLOCK_TOKENS, BYTES_PER_TOKEN = 10, 128, 2 * 4 * 32 * 4


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> Engine:
    return load_engine("hf", tiny_model_dir, dtype="float32")


@pytest.fixture(scope="module", params=[pytest.param("sync", marks=pytest.mark.long), "async"])
def engine(
    request: pytest.FixtureRequest,
    tiny_model_dir: Path,
    async_scheduling: Callable[[], contextlib.AbstractContextManager[None]],
) -> Iterator[Engine]:
    """Its cache holds a few sequences, and an iteration some prompts and a piece of another."""
    with async_scheduling() if request.param == "async" else contextlib.nullcontext():
        crowded = load_engine(
            "vllm",
            tiny_model_dir,
            dtype="float32",
            kv_cache_memory_bytes=CACHE_BLOCKS * BLOCK_TOKENS * BYTES_PER_TOKEN,
            enable_chunked_prefill=True,
            max_num_batched_tokens=512,
        )
        core = crowded._llm.engine_core.engine_core
        assert (core.batch_queue is not None) == (request.param == "async")
        yield crowded
        crowded.close()


class Traffic:
    """Requests that enter a batch of vLLM's, move, leave and return, at random; `outputs` are their true tokens."""

    most, vocab_size = 12, 500

    def __init__(self) -> None:
        from vllm.v1.worker.gpu_input_batch import InputBatch

        device = torch.device("cpu")
        self.batch = InputBatch(
            self.most, 4096, 4096, device, self.vocab_size, block_sizes=[4096], max_num_blocks_per_req=[1]
        )
        self.chance = random.Random(0)
        self.outputs: dict[str, list[int]] = {}
        self._waiting: list = []
        self._states: dict = {}
        self.swaps = self.resumed = 0

    def change(self) -> list:
        """The states of the rows of the next step."""
        for name in list(self.batch.req_id_to_index):
            if self.chance.random() < 0.05:
                self.batch.remove_request(name)
                state = self._states.pop(name)
                self._waiting += [state] if self.chance.random() < 0.6 else []
        if len(self._waiting) < 8:
            self._waiting.append(self._new())
        while self._waiting and len(self._states) < self.most and self.chance.random() < 0.6:
            state = self._waiting.pop(self.chance.randrange(len(self._waiting)))
            state.output_token_ids = list(self.outputs[state.req_id])
            self.resumed += bool(state.output_token_ids)
            self._states[state.req_id] = state
            self.batch.add_request(state)
        self.batch.condense()
        if self.batch.num_reqs > 1 and self.chance.random() < 0.3:
            self.batch.swap_states(*self.chance.sample(range(self.batch.num_reqs), 2))
            self.swaps += 1
        self.batch.refresh_metadata()
        return [self._states[name] for name in self.batch.req_ids]

    def _new(self) -> object:
        from vllm import SamplingParams as VLLMParams
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        number = len(self.outputs)
        self.outputs[f"{number}"] = []
        penalty, seed = self.chance.choice([1.0, 1.0, 1.2, 0.7]), self.chance.choice([None, number])
        params = VLLMParams(extra_args={"repetition_penalty": penalty, "seed": seed})
        prompt = self.chance.choices(range(self.vocab_size), k=self.chance.randrange(1, 30))
        return CachedRequestState(f"{number}", prompt, [], params, None, ([0],), 0, [])


def plainly_penalized(logits: torch.Tensor, states: list, outputs: list[list[int]]) -> torch.Tensor:
    from vllm.v1.sample.ops.penalties import apply_all_penalties

    prompts = [torch.tensor(state.prompt_token_ids) for state in states]
    prompts = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=logits.shape[1])
    penalties = torch.tensor([state.sampling_params.extra_args["repetition_penalty"] for state in states])
    none = torch.zeros_like(penalties)
    return apply_all_penalties(logits.clone(), prompts, none, none, penalties, outputs)


@pytest.mark.parametrize("placeholder", [None, -1], ids=["sync", "async"])
def test_rows_follow_their_requests(placeholder: int | None) -> None:
    from xbai.engine.vllm.rows import BatchRows

    traffic = Traffic()
    discarded = torch.zeros(traffic.most, dtype=torch.bool)
    runner = SimpleNamespace(
        device=discarded.device,
        max_num_reqs=traffic.most,
        input_batch=traffic.batch,
        discard_request_mask=SimpleNamespace(gpu=discarded),
    )
    rows = BatchRows(runner)
    traffic.batch.logitsprocs.non_argmax_invariant.append(rows)
    for _ in range(400):
        if not (states := traffic.change()):
            continue
        outputs = [traffic.outputs[state.req_id] for state in states]
        logits = torch.randn(len(states), traffic.vocab_size) * 3
        expected = plainly_penalized(logits, states, outputs)
        assert rows.apply(logits).equal(expected)
        numbers = rows.uniforms()
        for row, state in enumerate(states):
            if (seed := state.sampling_params.extra_args["seed"]) is not None:
                position = np.array([len(outputs[row])], np.uint64)
                assert numbers[row] == uniforms(np.array([seed], np.uint64), position)
        tokens = torch.randint(traffic.vocab_size, (len(states),), dtype=torch.int32)
        for row, (state, token) in enumerate(zip(states, tokens.tolist(), strict=True)):
            # At first more often: a prompt of several pieces.
            discarded[row] = traffic.chance.random() < (0.02 if outputs[row] else 0.5)
            if not discarded[row]:
                outputs[row].append(token)
                state.output_token_ids.append(token if placeholder is None else placeholder)
        rows.append(tokens)
    assert min(traffic.swaps, traffic.resumed) > 20


@pytest.fixture
def unfinished_prompts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows of each step ended a piece of a prompt only, so that their token was dropped."""
    from xbai.engine.vllm.rows import BatchRows

    append, found = BatchRows.append, []

    def recording(self: BatchRows, tokens: torch.Tensor) -> None:
        found.append(int(self._discarded.gpu[: len(tokens)].sum()))
        append(self, tokens)

    monkeypatch.setattr(BatchRows, "append", recording)
    return found


Asked = list[tuple[list[int], SamplingParams]]


def crowd(number: int, **params: object) -> Asked:
    """Requests of mixed lengths and penalties, some without one; prompts share beginnings."""
    generator = random.Random(number)
    common = [generator.randrange(5, 200) for _ in range(BLOCK_TOKENS + 20)]
    asked = []
    for index in range(number):
        prompt = common[: generator.randrange(1, len(common))] + [5 + index] * generator.randrange(1, 60)
        penalty = (1.0, 1.05, 1.3, 0.9)[index % 4]
        length = generator.choice([3, 40, 120, 300])
        asked.append((prompt, SamplingParams(max_tokens=length, repetition_penalty=penalty, **params)))
    return asked


def run_in_waves(engine: Engine, asked: Asked) -> list[list]:
    """Some requests after others have begun, and among requests that are aborted."""
    results = {}
    requests = [engine.samples(prompt, params) for prompt, params in asked]
    for index, (prompt, params) in enumerate(asked):
        for sample in requests[index]:
            engine.add(sample)
        if index % 5 == 4:
            dropped = engine.samples(prompt[::-1], replace(params, max_tokens=200))
            for sample in dropped:
                engine.add(sample)
            for _ in range(7):
                results.update(engine.step())
            engine.abort(dropped)
    while engine.has_unfinished():
        results.update(engine.step())
    return [[results[sample] for sample in samples] for samples in requests]


def test_penalties_are_those_of_the_reference(
    engine: Engine, reference: Engine, preemptions: list[str], unfinished_prompts: list[int]
) -> None:
    asked = crowd(24, temperature=0.0, ignore_eos=True, log_probs=True)
    expected = reference.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    for [ours], [theirs] in zip(run_in_waves(engine, asked), expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)
    assert len(unfinished_prompts) > 300
    assert any(unfinished_prompts)
    assert preemptions
    [metadata] = engine._llm.collective_rpc(lambda worker: worker.model_runner.input_batch.sampling_metadata)
    assert not metadata.output_token_ids, "vLLM would wait for the tokens of the step before"


def test_a_seed_gives_the_samples_of_the_reference_whatever_the_batch(
    engine: Engine, reference: Engine, preemptions: list[str]
) -> None:
    asked = crowd(20, n=2, ignore_eos=True)
    filters = ({}, {"top_p": 0.9}, {"top_k": 30}, {"top_p": 0.8, "top_k": 50}, {"temperature": 0.6})
    for index, (prompt, params) in enumerate(asked):
        changes = {"n": 1, "temperature": 0.0} if index % 7 == 6 else filters[index % len(filters)]
        asked[index] = prompt, replace(params, seed=None if index % 6 == 5 else index, **changes)
    crowded = run_in_waves(engine, asked)
    assert preemptions
    del preemptions[:]
    seeded = [index for index, (_, params) in enumerate(asked) if params.seed is not None]
    for index in seeded[:4]:
        assert engine.generate([asked[index][0]], asked[index][1]) == [crowded[index]]
    assert not preemptions
    expected = reference.generate([asked[index][0] for index in seeded], [asked[index][1] for index in seeded])
    pairs = [pair for index, theirs in zip(seeded, expected, strict=True) for pair in zip(crowded[index], theirs)]
    parted = [
        next((one, other) for one, other in zip(ours.token_ids, theirs.token_ids) if one != other)
        for ours, theirs in pairs
        if ours.token_ids != theirs.token_ids
    ]
    # The engines' logits differ in their last bits. Seldom a number falls so close to where one token's share ends and
    # that of the next id begins that this decides.
    assert len(parted) <= 1 < len(pairs)
    assert all(abs(one - other) == 1 for one, other in parted)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.7}, {"top_k": 12}, {"top_p": 0.9, "top_k": 20}])
def test_seeded_samples_follow_the_distribution(engine: Engine, tiny_model_dir: Path, filters: dict) -> None:
    prompt, count = [1, 2, 3], 3000
    params = SamplingParams(n=count, max_tokens=1, temperature=0.8, seed=1, repetition_penalty=1.5, **filters)
    [completions] = engine.generate([prompt], params)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    logits[prompt] = torch.where(logits[prompt] > 0, logits[prompt] / 1.5, logits[prompt] * 1.5)
    probs, order = (logits / 0.8).softmax(-1).sort(descending=True)
    kept = torch.arange(len(probs)) < filters.get("top_k", len(probs))
    probs = torch.where(kept, probs, 0) / probs[kept].sum()
    probs[probs.cumsum(-1) - probs >= filters.get("top_p", 1.0)] = 0
    expected = count * probs / probs.sum()
    found = torch.tensor([one.token_ids[0] for one in completions]).bincount(minlength=len(probs))[order]
    assert not found[expected == 0].any()
    # The rare ones together, so that each class is expected a few times.
    rare = expected < 8
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    found = torch.cat([found[~rare], found[rare].sum()[None]])
    chi_square = ((found - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    # Its mean is the number of classes less one, its variance twice that.
    classes = len(expected) - 1
    assert chi_square < classes + 4 * (2 * classes) ** 0.5
