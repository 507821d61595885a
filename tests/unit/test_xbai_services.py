"""XBai o4's own services behind our driver, and the requests of its own client at our services."""

import json
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from clocks import wait_until
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForCausalLM

from xbai.client import replicas
from xbai.client.replicas import RetryPolicy
from xbai.engine import SamplingParams, load_engine
from xbai.engine.scorer import Scorer
from xbai.errors import UserError
from xbai.infer.options import RunOptions
from xbai.infer.run import run
from xbai.measure.metrics import report_files
from xbai.search.options import SearchOptions
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app
from xbai.serve.score import create_score_app
from xbai.serve.scorer_thread import ScoreModel, ScorerThread

RIGHT, WRONG = "It is \\boxed{7+8-1+1-5}.", "It is \\boxed{7+8}."
PUBLISHED_FIELDS = {"prefix_prompt", "max_tokens", "response_num", "stop", "temperature", "seed"}
IGNORES, FORBIDS = ConfigDict(extra="ignore"), ConfigDict(extra="forbid")

ServeApp = Callable[[FastAPI], str]


class XBaiServices:
    """Both of XBai's services: their fields, none of which may be null, their answers, no `/ready`.

    A response is right where its seed and place say so, and right ones have the higher score.

    Args:
        serve_app: see the fixture.
        extra: what becomes of fields that they do not know.
        errors: as many requests to each are answered with a failure first, in XBai's way: with status 200.
    """

    def __init__(self, serve_app: ServeApp, extra: ConfigDict = IGNORES, errors: int = 0) -> None:
        class GenerateInput(BaseModel):
            model_config = extra
            prefix_prompt: str
            max_tokens: int = 1024
            response_num: int = 8
            stop: list = None
            temperature: float = 0.8
            seed: int = None

        class ScoreInput(BaseModel):
            model_config = extra
            text: str
            return_all_scores: bool = False

        self.asked: list[dict[str, Any]] = []
        self.errors = {"policy": errors, "score": errors}
        policy, score = FastAPI(), FastAPI()

        @policy.post("/generate")
        async def generate(input: GenerateInput) -> dict[str, Any]:
            self.asked.append(input.model_dump(exclude_unset=True))
            if self._fails("policy"):
                return {"error": "CUDA out of memory"}
            texts = [RIGHT if (input.seed + i) % 2 else WRONG for i in range(input.response_num)]
            return {"results": texts}

        @score.post("/score")
        async def get_score(input: ScoreInput) -> dict[str, Any]:
            if self._fails("score"):
                return {"error": "CUDA out of memory"}
            value = 0.9 if input.text.endswith(RIGHT) else 0.2
            details = {"all_scores": [value], "token_ids": [1, 2], "score_positions": [0]}
            return {"value": value, **(details if input.return_all_scores else {})}

        self.policy_url, self.score_url = serve_app(policy), serve_app(score)

    def _fails(self, service: str) -> bool:
        self.errors[service] -= 1
        return self.errors[service] >= 0


@pytest.fixture
def options(tmp_path: Path, tiny_model_dir: Path) -> RunOptions:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"prompt": f"Make 10 ({n})", "answer": "7 8 1 1 5"}) + "\n" for n in "ab"), encoding="utf-8"
    )
    return RunOptions(
        task="make10",
        input_file=str(questions),
        output_file=str(tmp_path / "out.jsonl"),
        model_dir=str(tiny_model_dir),
        response_api_url="",
        n_samples=2,
        branch=4,
        response_num=4,
        retry=RetryPolicy(patience_s=5.0),
    )


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "RETRY_BASE_S", 0.01)


def on(services: XBaiServices, options: RunOptions, **changes: Any) -> RunOptions:
    urls = {"response_api_url": services.policy_url + "/score", "score_api_url": services.score_url + "/score"}
    fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
    return RunOptions(**{**fields, **urls, **changes})


def lines(options: RunOptions) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(options.output_file).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("extra", [IGNORES, FORBIDS], ids=["ignores", "forbids"])
def test_the_driver_finishes_on_xbais_services(
    extra: ConfigDict, serve_app: ServeApp, options: RunOptions, caplog: pytest.LogCaptureFixture
) -> None:
    services = XBaiServices(serve_app, extra)
    run(on(services, options))
    assert len(services.asked) == 4
    for request in services.asked:
        assert request.keys() == PUBLISHED_FIELDS - {"stop"}
        assert (request["temperature"], request["max_tokens"], request["response_num"]) == (0.6, 32768, 4)
    for line in lines(options):
        output = line["output"]
        assert [text.removeprefix(line["prompt"]) in (RIGHT, WRONG) for text in output["solution_lst"]] == [True] * 8
        assert output["score_lst"] == [0.9 if text.endswith(RIGHT) else 0.2 for text in output["solution_lst"]]
        assert output["content"] == RIGHT
    report, _ = report_files("make10", [options.output_file])
    assert (report.questions, report.samples, report.mean_at_1.mean) == (2, 8, 0.5)
    assert report.curves["best_of_n"][8].mean == 1.0
    for option in ("--response_api_url", "--score_api_url"):
        assert caplog.text.count(f"{option}: the service does not say which model it serves") == 1
    run(on(services, options, n_samples=3))
    assert len(services.asked) == 6
    assert [len(line["output"]["solution_lst"]) for line in lines(options)] == [12, 12]


def test_what_is_set_is_sent(serve_app: ServeApp, options: RunOptions, caplog: pytest.LogCaptureFixture) -> None:
    services = XBaiServices(serve_app)
    run(on(services, options, stop=("\n\n", "Q"), top_p=0.9, top_k=20))
    assert [request["stop"] for request in services.asked] == [["\n\n", "Q"]] * 4
    assert "it may know nothing of --top_p 0.9 --top_k 20" in caplog.text
    strict = XBaiServices(serve_app, FORBIDS)
    with pytest.raises(UserError, match=r"/generate: 422: .*top_p"):
        run(on(strict, options, output_file=f"{options.output_file}.strict", top_p=0.9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_api_url": None}, "the service offers no scores; give --score_api_url, or --score_source none"),
        ({"score_source": "fused"}, "the service offers no scores"),
        (
            {"search": SearchOptions("beam"), "branch": None},
            "/generate does not return finish_reasons and token_counts, which a search by steps needs",
        ),
    ],
    ids=["no score service", "fused", "beam"],
)
def test_what_only_this_projects_services_can_do_is_refused(
    changes: dict[str, Any], message: str, serve_app: ServeApp, options: RunOptions
) -> None:
    with pytest.raises(UserError, match=message):
        run(on(XBaiServices(serve_app), options, **changes))


def test_without_scores(serve_app: ServeApp, options: RunOptions) -> None:
    services = XBaiServices(serve_app, FORBIDS)
    run(on(services, options, score_api_url=None, score_source="none"))
    assert [line["output"]["score_lst"] for line in lines(options)] == [[None] * 8] * 2


def test_a_failure_with_status_200_is_one(
    serve_app: ServeApp, options: RunOptions, caplog: pytest.LogCaptureFixture
) -> None:
    run(on(XBaiServices(serve_app, errors=2), options))
    assert [line["output"]["score_lst"].count(None) for line in lines(options)] == [0, 0]
    assert "the service reports: CUDA out of memory" in caplog.text
    impatient = {"retry": RetryPolicy(patience_s=0.5), "output_file": f"{options.output_file}.failed"}
    with pytest.raises(UserError, match=r"no answer from .* for 0\.5 s \(the service reports: CUDA out of memory"):
        run(on(XBaiServices(serve_app, errors=1000), options, **impatient))


def test_a_file_begun_at_the_services_default_temperature_is_not_mixed(
    serve_app: ServeApp, options: RunOptions
) -> None:
    services = XBaiServices(serve_app)
    run(on(services, options, temperature=0.8))
    with pytest.raises(UserError, match=r"results of another run \(temperature=0.8, now 0.6\)"):
        run(on(services, options))


@pytest.fixture
def our_services(serve_app: ServeApp, tiny_model_dir: Path) -> tuple[str, str]:
    policy = EngineThread(lambda: load_engine("hf", tiny_model_dir))
    scorer = Scorer.from_folder(tiny_model_dir)
    tokenizer = load_engine("hf", tiny_model_dir).tokenizer
    score = ScorerThread(lambda: ScoreModel(scorer, tokenizer, 512))
    urls = (
        serve_app(create_policy_app(policy, str(tiny_model_dir), Limits())),
        serve_app(create_score_app(score, str(tiny_model_dir), Limits())),
    )
    wait_until(lambda: policy.ready and score.ready, "both models are loaded")
    return urls


def test_services_that_are_mixed_up_are_asked_about(
    serve_app: ServeApp, our_services: tuple[str, str], options: RunOptions
) -> None:
    theirs = XBaiServices(serve_app)
    for changes in (
        {"response_api_url": theirs.score_url},
        {"response_api_url": our_services[1]},
        {"score_api_url": theirs.policy_url},
        {"score_api_url": our_services[0], "score_source": "service"},
    ):
        with pytest.raises(UserError, match=r"/(generate|score): 4\d\d: .*; is this the right service\?"):
            run(on(theirs, options, **changes, output_file=f"{options.output_file}.{len(str(changes))}"))


@pytest.mark.parametrize("path", ["/generate", "/score"])
@pytest.mark.parametrize("stop", [[], ["\n\n", "Q"]])
def test_xbais_client_is_served(our_services: tuple[str, str], path: str, stop: list[str]) -> None:
    policy_url, score_url = our_services
    prompt = "<|im_start|>user\nMake 10<|im_end|>\n<|im_start|>assistant\n"
    answers: list[dict[str, Any]] = []

    def send(count: int) -> None:
        body = {
            "prefix_prompt": prompt,
            "max_tokens": 8,
            "response_num": count,
            "stop": stop,
            "temperature": 0.6,
            "seed": secrets.randbelow(2**32),
        }
        answers.append(httpx.post(policy_url + path, json=body, timeout=60).raise_for_status().json())

    senders = [threading.Thread(target=send, args=(count,)) for count in (2, 1)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    texts = [prompt + text for answer in answers for text in answer["results"]]
    assert len(texts) == 3
    swapped = httpx.post(f"{policy_url}/score", json={"text": prompt})
    assert (swapped.status_code, "prefix_prompt: Field required" in swapped.text) == (422, True)
    for text in texts:
        body = {"text": text, "return_all_scores": False}
        answer = httpx.post(f"{score_url}/score", json=body, timeout=60).raise_for_status().json()
        assert answer.keys() == {"value"}
        assert 0 <= answer["value"] <= 1
    body = {"text": texts[0] + ".\n\nSo.\n\n", "return_all_scores": True}
    answer = httpx.post(f"{score_url}/score", json=body, timeout=60).raise_for_status().json()
    assert answer.keys() == {"value", "all_scores", "token_ids", "score_positions"}


def plain_mean_log_probs(
    folder: Path, prompt: str, sampling: dict[str, Any], temperature: float
) -> tuple[list[str], list[float]]:
    """Texts of the engine's samples, and the mean log-probs of their tokens by a plain transformers model."""
    engine = load_engine("hf", folder)
    prompt_ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
    (completions,) = engine.generate([prompt_ids], SamplingParams(temperature=temperature, **sampling))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    means = []
    for ids in (completion.token_ids for completion in completions):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
        means.append(log_probs.gather(1, torch.tensor(ids)[:, None]).mean().item())
    return [completion.text for completion in completions], means


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_mean_log_probs_are_those_of_a_plain_model(
    our_services: tuple[str, str], tiny_model_dir: Path, temperature: float
) -> None:
    sampling = {"max_tokens": 8, "top_p": 0.9, "repetition_penalty": 1.05, "seed": 3}
    body = {"prefix_prompt": "Make 10", "response_num": 3, "temperature": temperature, **sampling}
    plain = httpx.post(f"{our_services[0]}/generate", json=body, timeout=60).json()
    assert plain.keys() == {"results", "finish_reasons", "token_counts"}
    answer = httpx.post(f"{our_services[0]}/generate", json=body | {"return_log_probs": True}, timeout=60).json()
    assert {name: answer[name] for name in plain} == plain, "asking changes no sample"
    texts, expected = plain_mean_log_probs(tiny_model_dir, "Make 10", {**sampling, "n": 3}, temperature)
    assert answer["results"] == texts
    assert answer["mean_log_probs"] == pytest.approx(expected, abs=1e-4)


def test_the_driver_keeps_the_log_probs_of_services_that_have_them(
    serve_app: ServeApp, our_services: tuple[str, str], options: RunOptions
) -> None:
    policy, score = our_services
    ours = {"response_api_url": policy, "score_api_url": score, "max_tokens": 8}
    theirs = XBaiServices(serve_app, FORBIDS)
    for changes in (ours, {**ours, "n_samples": 3}, {**ours, "n_samples": 3, "score_source": "service"}):
        run(on(theirs, options, **changes))
        means = [line["output"]["mean_log_prob_lst"] for line in lines(options)]
        assert [len(each) for each in means] == [4 * changes.get("n_samples", 2)] * 2
        assert all(-20 < mean < 0 for each in means for mean in each)
    assert "best_of_n_log_prob" in report_files("make10", [options.output_file])[0].curves
    theirs_path = f"{options.output_file}.theirs"
    run(on(theirs, options, output_file=theirs_path))
    report, _ = report_files("make10", [theirs_path])
    assert "best_of_n" in report.curves and "best_of_n_log_prob" not in report.curves
