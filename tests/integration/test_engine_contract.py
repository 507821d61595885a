"""What every engine promises, against plain transformers forwards in fp32."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from clocks import PATIENCE_S, wait_until
from transformers import AutoModelForCausalLM, PreTrainedModel

from xbai.aggregation import aggregate, running_scores
from xbai.engine import Completion, Engine, SamplingParams, load_engine
from xbai.errors import UserError
from xbai.search.budget import parse_budget
from xbai.search.budgeted import generate_budgeted
from xbai.search.group import CandidateGroup
from xbai.search.rule import Candidate
from xbai.serve.engine_thread import EngineThread
from xbai.serve.reflection import Answer, Question, reflect
from xbai.serve.thinking import Said
from xbai.sprm import load_score_head, load_sprm_config, step_feature_mask, trajectory_scores

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
PROMPTS = [[1, 2, 3, 4], [7, 8] * 20, [5], list(range(10, 23))]


class Loaded(NamedTuple):
    engine: Engine
    folder: Path
    model: PreTrainedModel
    tied: bool


def reference_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("hf", False), id="hf-untied"),
        pytest.param(("hf", True), id="hf-tied"),
        pytest.param(("vllm", False), id="vllm-untied", marks=needs_vllm),
        pytest.param(("vllm", True), id="vllm-tied", marks=needs_vllm),
    ],
)
def loaded(request: pytest.FixtureRequest, make_tiny_model: Callable[..., Path]) -> Iterator[Loaded]:
    name, tied = request.param
    folder = make_tiny_model(tied=tied)
    engine = load_engine(name, folder, dtype="float32")
    yield Loaded(engine, folder, reference_model(folder), tied)
    engine.close()


def assert_log_probs(model: PreTrainedModel, prompt: list[int], completion: Completion, temperature: float) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert torch.tensor(completion.log_probs) == pytest.approx(expected, abs=1e-4)


def assert_greedy(engine: Engine, model: PreTrainedModel) -> None:
    results = engine.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0, log_probs=True))
    for prompt, (completion,) in zip(PROMPTS, results, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :]
        assert completion.token_ids == expected.tolist()
        assert_log_probs(model, prompt, completion, 1.0)


# First in the file: another engine of this process would have a process group of its own.
@pytest.mark.parametrize("vllm", [pytest.param("vllm", marks=needs_vllm)])
def test_a_cache_that_holds_no_whole_sequence_is_refused(vllm: str, tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^vLLM: .*gpu_memory_utilization.*max_model_len") as refused:
        load_engine(vllm, tiny_model_dir, kv_cache_memory_bytes=2**18)
    assert "\n" not in str(refused.value)
    assert not torch.distributed.is_initialized(), "the next engine would take it for a trainer's process group"


@pytest.mark.parametrize("vllm", [pytest.param("vllm", marks=needs_vllm)])
def test_the_model_goes_when_vllm_drops_it_and_another_can_be_loaded(vllm: str, tiny_model_dir: Path) -> None:
    for _ in range(2):
        engine = load_engine(vllm, tiny_model_dir, dtype="float32", with_scores=True)
        # As held by vLLM while it releases the pools that a sleeping engine's memory comes from.
        runner = engine._llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        model = weakref.ref(runner.get_model())
        [[completion]] = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(completion.token_ids) == 4
        assert model() is not None
        engine.close()
        assert model() is None, gc.get_referrers(model())
    assert not torch.distributed.is_initialized()


def test_greedy_equals_transformers_before_and_after_update_weights(
    loaded: Loaded, make_tiny_model: Callable[..., Path]
) -> None:
    engine, _, model, tied = loaded
    assert_greedy(engine, model)
    other = reference_model(make_tiny_model(tied=tied, seed=1))
    # Parameters leave a tied LM head out, a state dict names it twice; both must do.
    engine.update_weights(other.named_parameters())
    assert_greedy(engine, other)
    engine.update_weights(model.state_dict().items())
    assert_greedy(engine, model)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8, "top_k": 20, "repetition_penalty": 1.2}], ids=["all", "some"])
def test_log_probs_are_those_of_logits_over_temperature(
    loaded: Loaded, temperature: float, filters: dict[str, float]
) -> None:
    params = SamplingParams(n=2, max_tokens=24, temperature=temperature, seed=1, log_probs=True, **filters)
    # A greedy companion shares the batch with a temperature of its own.
    mixed = [params, params, params, SamplingParams(max_tokens=24, temperature=0, log_probs=True)]
    for prompt, chosen, completions in zip(PROMPTS, mixed, loaded.engine.generate(PROMPTS, mixed), strict=True):
        for completion in completions:
            assert_log_probs(loaded.model, prompt, completion, chosen.temperature or 1.0)


def test_eager_engines_compile_nothing(loaded: Loaded) -> None:
    params = SamplingParams(max_tokens=4, top_p=0.9, top_k=3, seed=0, log_probs=True)
    torch._dynamo.utils.counters.clear()
    loaded.engine.generate(PROMPTS, params)
    assert not torch._dynamo.utils.counters["frames"]


def test_top_k_keeps_the_most_likely_tokens(loaded: Loaded) -> None:
    [completions] = loaded.engine.generate([[1, 2, 3]], SamplingParams(n=64, max_tokens=1, top_k=3, seed=0))
    with torch.no_grad():
        best = loaded.model(torch.tensor([[1, 2, 3]])).logits[0, -1].topk(3).indices.tolist()
    assert {completion.token_ids[0] for completion in completions} == set(best)


def test_a_seed_fixes_each_sample_whatever_the_batch(loaded: Loaded) -> None:
    params = SamplingParams(n=4, max_tokens=20, seed=5)
    [alone] = loaded.engine.generate(PROMPTS[:1], params)
    assert len({tuple(completion.token_ids) for completion in alone}) == 4
    assert loaded.engine.generate(PROMPTS[:1], params) == [alone]
    others = SamplingParams(n=3, max_tokens=33, temperature=0.5, top_p=0.9)
    assert loaded.engine.generate([*PROMPTS[1:], PROMPTS[0]], [others, others, others, params])[-1] == alone
    [fewer] = loaded.engine.generate(PROMPTS[:1], SamplingParams(n=2, max_tokens=20, seed=5))
    assert fewer == alone[:2]


def test_end_of_sequence_ends_a_response(loaded: Loaded) -> None:
    eos = loaded.engine.tokenizer.eos_token_id
    [completions] = loaded.engine.generate([[1, 2]], SamplingParams(n=16, max_tokens=150, temperature=2, seed=0))
    reasons = [completion.finish_reason for completion in completions]
    assert {*reasons} == {"stop", "length"}
    for completion in completions:
        assert eos not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == eos) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 150
    params = SamplingParams(n=16, max_tokens=150, temperature=2, seed=0, ignore_eos=True)
    [completions] = loaded.engine.generate([[1, 2]], params)
    assert {len(completion.token_ids) for completion in completions} == {150}


def test_stop_strings_end_and_are_cut(loaded: Loaded) -> None:
    params = SamplingParams(max_tokens=60, seed=2)
    [[whole]] = loaded.engine.generate([[1, 2]], params)
    stop = next(character for character in whole.text[5:] if character.isascii() and character.isprintable())
    [[cut]] = loaded.engine.generate([[1, 2]], SamplingParams(max_tokens=60, seed=2, stop=(stop,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert stop in loaded.engine.tokenizer.decode(cut.token_ids)
    assert stop not in loaded.engine.tokenizer.decode(cut.token_ids[:-1])


def test_stop_tokens_end_and_stay(loaded: Loaded) -> None:
    engine = loaded.engine
    [[whole]] = engine.generate([[1, 2]], SamplingParams(max_tokens=60, seed=2))
    texts = {i: engine.tokenizer.decode([i], skip_special_tokens=True) for i in whole.token_ids[5:]}
    printable = [i for i, text in texts.items() if text.isascii() and text.isprintable() and text]
    stops = SamplingParams(max_tokens=60, seed=2, stop_token_ids=tuple(printable[:2]))
    [[paused]] = engine.generate([[1, 2]], stops, return_scores=True)
    first = min(whole.token_ids.index(i) for i in stops.stop_token_ids)
    assert (paused.finish_reason, paused.token_ids) == ("stop_token", whole.token_ids[: first + 1])
    assert paused.text == engine.tokenizer.decode(paused.token_ids, skip_special_tokens=True)
    assert paused.step_scores is not None
    last = engine.tokenizer.decode(paused.token_ids[-1:])
    [[cut]] = engine.generate([[1, 2]], replace(stops, stop=(last,)))
    assert (cut.finish_reason, cut.text) == ("stop", paused.text[: paused.text.index(last)])
    [[short]] = engine.generate([[1, 2]], replace(stops, max_tokens=first))
    assert short.finish_reason == "length"


def plain_scores(loaded: Loaded, sequence: list[int], start: int) -> tuple[float, list[float], list[int]]:
    rule_and_head = load_sprm_config(loaded.folder, loaded.engine.tokenizer)
    head = load_score_head(loaded.folder, loaded.model.config.hidden_size, rule_and_head)
    ids = torch.tensor([sequence])
    mask = step_feature_mask(ids, torch.arange(len(sequence))[None] >= start, rule_and_head.step_rule)
    with torch.no_grad():
        logits = head(loaded.model(ids, output_hidden_states=True).hidden_states[-2])
    value = trajectory_scores(logits, mask).item()
    return value, logits.sigmoid()[mask].tolist(), mask[0].nonzero().flatten().tolist()


def test_step_scores_equal_a_plain_computation(loaded: Loaded) -> None:
    # A faint final norm makes all tokens about equally likely, the step token among them; it leaves features alone.
    weights = dict(loaded.model.named_parameters())
    loaded.engine.update_weights((weights | {"model.norm.weight": 0.05 * weights["model.norm.weight"]}).items())
    params = SamplingParams(n=12, max_tokens=150, seed=3, ignore_eos=True, log_probs=True)
    steps, rule = 0, loaded.engine.step_rule
    for prompt, completions in zip(PROMPTS, loaded.engine.generate(PROMPTS, params, return_scores=True), strict=True):
        scored = loaded.engine.score([prompt + c.token_ids for c in completions], [len(prompt)] * len(completions))
        for completion, result in zip(completions, scored, strict=True):
            value, scores, positions = plain_scores(loaded, prompt + completion.token_ids, len(prompt))
            assert completion.step_scores == pytest.approx(scores, abs=1e-5)
            assert result.step_scores == pytest.approx(scores, abs=1e-5)
            assert result.value == pytest.approx(value, abs=1e-5)
            assert result.positions == positions
            assert completion.step_ends == [position + 2 - len(prompt) for position in positions]
            assert {completion.token_ids[end - 1] for end in completion.step_ends} <= set(rule.step_ids)
            of_tokens = np.split(completion.log_probs, completion.step_ends)
            assert completion.step_log_probs == pytest.approx([tokens.sum() for tokens in of_tokens], abs=1e-9)
            steps += len(scores)
    assert steps > 10
    loaded.engine.update_weights(weights.items())


# So low a penalty makes a model of random weights repeat the prompt's tokens, the step token among them.
STEPPING = SamplingParams(n=12, max_tokens=100, seed=3, ignore_eos=True, log_probs=True, repetition_penalty=0.2)


def stepping_prompts(engine: Engine) -> list[list[int]]:
    return [engine.tokenizer.encode(text) for text in ("a.\n\nb", "four.\n\n", "7.\n\n8")]


@pytest.mark.parametrize("rule", ["stop:0.999999/5", "prune:0.999@1", "majority:0.999999/12"])
def test_a_budget_that_is_never_used_gives_what_there_is_without_one(loaded: Loaded, rule: str) -> None:
    prompts = stepping_prompts(loaded.engine)
    plain = loaded.engine.generate(prompts, STEPPING, return_scores=True)
    budgeted = generate_budgeted(
        loaded.engine,
        prompts,
        STEPPING,
        parse_budget(rule),
        chance=lambda score: score,
        answers=lambda responses: [None] * len(responses),
    )
    for ours, theirs in zip(chain(*budgeted), chain(*plain), strict=True):
        assert (ours.token_ids, ours.text, ours.finish_reason) == (theirs.token_ids, theirs.text, theirs.finish_reason)
        assert ours.step_scores == pytest.approx(theirs.step_scores, abs=1e-5)
        assert ours.step_ends == theirs.step_ends
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)


def test_pruned_and_stopped_samples_are_those_that_the_rule_names_on_whole_ones(loaded: Loaded) -> None:
    engine, rule = loaded.engine, parse_budget("prune:0.5@1,2+stop:0.55/6")
    prompts = stepping_prompts(engine)
    plain = engine.generate(prompts, STEPPING, return_scores=True)
    budgeted = generate_budgeted(engine, prompts, STEPPING, rule, chance=lambda score: score)
    assert not engine.has_unfinished()
    reasons = Counter(one.finish_reason for one in chain(*budgeted))
    assert min(reasons[reason] for reason in ("pruned", "length", "not_begun")) > 2
    for ours, theirs in zip(budgeted, plain, strict=True):
        group = CandidateGroup(rule, len(theirs), chance=lambda score: score)
        while wave := group.begin():
            candidates = [
                Candidate(running_scores(theirs[number].step_scores), aggregate(theirs[number].step_scores))
                for number in wave
            ]
            group.prune(candidates)
            group.end(candidates)
        for number, (sample, whole) in enumerate(zip(ours, theirs, strict=True)):
            if number not in group.pruned and number not in group.ended:
                assert (sample.finish_reason, sample.generated, sample.text) == ("not_begun", 0, "")
                continue
            steps = group.pruned.get(number, len(whole.step_ends))
            end = whole.step_ends[steps - 1] if number in group.pruned else len(whole.token_ids)
            assert sample.finish_reason == ("pruned" if number in group.pruned else whole.finish_reason)
            assert sample.token_ids == whole.token_ids[:end]
            assert sample.text == engine.detokenize(whole.token_ids[:end])
            assert len(sample.log_probs) == end <= sample.generated <= len(whole.token_ids)
            assert sample.step_ends == whole.step_ends[:steps]
            assert sample.step_scores == pytest.approx(whole.step_scores[:steps], abs=1e-5)


class SharedThread(EngineThread):
    """One of an engine that others use after it."""

    def _close(self, model: Engine) -> None: ...


def test_a_candidate_that_answers_after_it_was_chosen_says_what_it_would_have_said_at_once(loaded: Loaded) -> None:
    engine = loaded.engine
    # So low a penalty makes a model of random weights repeat the prompt's tokens, the tag among them.
    params = SamplingParams(n=3, max_tokens=40, temperature=0, repetition_penalty=0.1, ignore_eos=True)
    close_id = engine.tokenizer.convert_tokens_to_ids("</think>")
    prompts = [[close_id, first, first + 1, first + 2] for first in range(60)]
    greedy = [whole for whole, *_ in engine.generate(prompts, replace(params, n=1))]
    prompt_ids, whole = next(
        (ids, one) for ids, one in zip(prompts, greedy, strict=True) if close_id in one.token_ids[2:20]
    )
    thinking = whole.token_ids[: whole.token_ids.index(close_id) + 1]

    async def answers(thread: EngineThread) -> list[Answer]:
        told: list[Said] = []
        question = Question("", prompt_ids, params)
        once, at_once = await asyncio.gather(
            reflect(thread, question, tell=told.append), reflect(thread, replace(question, answer_once=False))
        )
        assert Said("".join(one.reasoning for one in told), "".join(one.content for one in told)) == once.said
        return [once, at_once]

    thread = SharedThread(lambda: engine)
    thread.start()
    wait_until(lambda: thread.ready, "it has the engine")
    once, at_once = asyncio.run(answers(thread))
    assert thread.stop(PATIENCE_S)
    assert [candidate.token_ids for candidate in once.candidates] == [thinking] * 3
    assert [candidate.token_ids for candidate in at_once.candidates] == [whole.token_ids] * 3
    assert once.response.token_ids == at_once.response.token_ids == whole.token_ids
    assert (once.response.text, once.said) == (at_once.response.text, at_once.said)
    assert once.generated == 3 * len(thinking) + len(whole.token_ids) - len(thinking)


def test_update_weights_reaches_the_scores(loaded: Loaded, make_tiny_model: Callable[..., Path]) -> None:
    engine, _, model, tied = loaded
    folder = make_tiny_model(tied=tied, seed=2)
    other = loaded._replace(folder=folder, model=reference_model(folder))
    head = torch.load(folder / "score_module.pt", weights_only=True)
    old_head = torch.load(loaded.folder / "score_module.pt", weights_only=True)
    sequence = engine.tokenizer.encode("One.\n\nTwo, three.\n\nFour.\n\n")
    named = [*other.model.named_parameters(), *((f"score_head.{name}", weight) for name, weight in head.items())]
    engine.update_weights(named)
    assert engine.score([sequence], [0])[0].step_scores == pytest.approx(plain_scores(other, sequence, 0)[1], abs=1e-5)
    engine.update_weights([*model.named_parameters(), *((f"score_head.{n}", w) for n, w in old_head.items())])
    assert engine.score([sequence], [0])[0].step_scores == pytest.approx(plain_scores(loaded, sequence, 0)[1], abs=1e-5)


def test_samples_can_be_added_and_aborted_while_others_run(loaded: Loaded) -> None:
    engine = loaded.engine
    first = engine.samples([1, 2, 3], SamplingParams(n=2, max_tokens=4, seed=0))
    dropped = engine.samples([1, 2, 3], SamplingParams(n=2, max_tokens=4, seed=0))
    for sample in (*first, *dropped):
        engine.add(sample)
    with pytest.raises(ValueError, match="unfinished"):
        engine.add(first[0])
    with pytest.raises(RuntimeError, match="unfinished"):
        engine.update_weights([])
    engine.abort(dropped)
    [late] = engine.samples([4, 5], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.abort([late])
    results = dict(engine.step())
    engine.add(late)
    while engine.has_unfinished():
        results.update(engine.step())
    assert results.keys() == {*first, late}
    assert len(results[late].token_ids) == 3
    [expected] = engine.generate([[1, 2, 3]], SamplingParams(n=2, max_tokens=4, seed=0))
    assert [results[sample] for sample in first] == expected


def test_max_tokens_is_clamped_to_the_context(loaded: Loaded) -> None:
    prompt = [3] * (loaded.engine.max_model_len - 2)
    [[completion]] = loaded.engine.generate([prompt], SamplingParams(max_tokens=100, ignore_eos=True))
    assert (len(completion.token_ids), completion.finish_reason) == (2, "length")


def test_unseeded_samples_differ(loaded: Loaded) -> None:
    [completions] = loaded.engine.generate([[1, 2, 3]], SamplingParams(n=4, max_tokens=20))
    assert len({tuple(completion.token_ids) for completion in completions}) == 4


# Last in the file: a failed update leaves vLLM's model unusable.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights | {"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}, "no such weight"),
        (lambda weights: {k: v for k, v in weights.items() if "layers.2.mlp.up" not in k}, "not given.*layers.2"),
        (lambda weights: weights | {"model.norm.weight": torch.zeros(3)}, r"norm.weight has shape \(3,\)"),
    ],
)
def test_weights_of_another_model_are_refused(loaded: Loaded, change: Callable[[dict], dict], message: str) -> None:
    if "vllm" in type(loaded.engine).__module__:
        pytest.skip("the check is in the base class, and a failed update leaves vLLM's model unusable")
    weights = dict(loaded.model.named_parameters())
    with pytest.raises(UserError, match=message):
        loaded.engine.update_weights(change(weights).items())
    loaded.engine.update_weights(weights.items())
