"""Both services as users start them: scripts, real sockets, a tiny random model."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from xbai.client.wire import read_responses
from xbai.sprm import StepRule, load_score_head, load_sprm_config, step_feature_mask, trajectory_scores

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TEXTS = [
    f"{PROMPT}<think>\n{' '.join('step' for _ in range(n))}.\n\nand {n} on.\n\n</think>\n\nso {n}" for n in range(1, 9)
]


@pytest.fixture(scope="module")
def policy(start_service: Callable, tiny_model_dir: Path):
    return start_service("policy_model_queue.py", "--model_path", str(tiny_model_dir), "--engine", "hf").wait_ready()


@pytest.fixture(scope="module")
def scorer(start_service: Callable, tiny_model_dir: Path):
    return start_service(
        "score_model_queue.py", "--model_path", str(tiny_model_dir), "--score_model_dim", "64", "--lang", "en",
        "--max_pending", "16", "--max_body_mb", "1",
    ).wait_ready()  # fmt: skip


def reference_score(folder: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[float, list[float]]:
    """The score by a plain forward pass with all hidden states, written against transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = load_sprm_config(folder, tokenizer)
    head = load_score_head(folder, model.config.hidden_size, config)
    prompt, response = tokenizer.encode(PROMPT), tokenizer.encode(text.removeprefix(PROMPT))
    ids = torch.tensor([prompt + response])
    response_mask = (torch.arange(ids.shape[1]) >= len(prompt))[None]
    with torch.inference_mode():
        hidden = model(ids, output_hidden_states=True).hidden_states[-2]
        logits = head(hidden)
    mask = step_feature_mask(ids, response_mask, StepRule.from_tokenizer(tokenizer))
    return float(trajectory_scores(logits, mask)), logits[mask].sigmoid().tolist()


def test_score_equals_plain_transformers(scorer, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bodies = [{"text": text, "return_all_scores": True} for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as clients:
        answers = list(clients.map(lambda body: httpx.post(f"{scorer.url}/score", json=body).json(), bodies))
    batch = httpx.post(f"{scorer.url}/score_batch", json={"texts": TEXTS}).json()["values"]
    for text, answer, batched in zip(TEXTS, answers, batch):
        value, step_scores = reference_score(tiny_model_dir, tiny_tokenizer, text)
        assert answer["value"] == pytest.approx(value, abs=1e-5)
        assert batched == pytest.approx(value, abs=1e-5)
        assert answer["all_scores"] == pytest.approx(step_scores, abs=1e-5)
        assert len(answer["score_positions"]) == len(step_scores) == 2
        assert tiny_tokenizer.decode(answer["token_ids"]) == text
    assert httpx.post(f"{scorer.url}/score", json={"text": TEXTS[0]}).json().keys() == {"value"}


def test_score_takes_the_prompt_as_told(scorer) -> None:
    text = "one.\n\ntwo.\n\nthree"
    whole, told = (
        httpx.post(f"{scorer.url}/score", json={"text": text, "return_all_scores": True, **extra}).json()
        for extra in ({}, {"prompt": "one.\n\n"})
    )
    assert (len(whole["all_scores"]), len(told["all_scores"])) == (2, 1)
    assert told["all_scores"][0] == pytest.approx(whole["all_scores"][1], abs=1e-6)
    wrong = httpx.post(f"{scorer.url}/score", json={"text": text, "prompt": "two"})
    assert (wrong.status_code, wrong.json()["detail"]) == (422, "prompt: text does not start with it")


def test_score_refusals(scorer) -> None:
    assert httpx.post(f"{scorer.url}/score", json={"text": "no step at all"}).json() == {"value": 0.0}
    long = httpx.post(f"{scorer.url}/score", json={"text": "x" * 513})
    assert (long.status_code, long.json()["detail"]) == (413, "text: 513 tokens, the model takes 512")
    assert httpx.post(f"{scorer.url}/score", json={"text": "x" * (2 << 20)}).status_code == 413
    assert httpx.post(f"{scorer.url}/score", json={"txt": "x"}).status_code == 422
    assert httpx.get(f"{scorer.url}/score").status_code == 405
    assert httpx.get(f"{scorer.url}/nowhere").json() == {"detail": "Not Found"}


def test_generate(policy) -> None:
    body = {"prefix_prompt": PROMPT, "max_tokens": 12, "response_num": 3, "seed": 7}
    first, second = (httpx.post(f"{policy.url}/generate", json=body, timeout=60).json() for _ in range(2))
    assert first == second, "a seed repeats"
    assert len(first["results"]) == len(first["finish_reasons"]) == len(first["token_counts"]) == 3
    assert len(set(first["results"])) > 1
    assert "scores" not in first


def test_generate_greedily(policy, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    body = {"prefix_prompt": PROMPT, "max_tokens": 12, "response_num": 1, "temperature": 0, "repetition_penalty": 1.0}
    answer = httpx.post(f"{policy.url}/generate", json=body, timeout=60).json()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    ids = torch.tensor([tiny_tokenizer.encode(PROMPT)])
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert answer["results"] == [tiny_tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)]


def test_generated_scores_equal_the_score_service(policy, scorer) -> None:
    # So low a penalty makes a model of random weights repeat the prompt's tokens, the step token among them.
    prompt = "one.\n\ntwo.\n\nthree"
    sampling = {"max_tokens": 20, "response_num": 48, "repetition_penalty": 0.12, "temperature": 1.0, "seed": 0}
    body = {"prefix_prompt": prompt, "return_scores": True, "return_log_probs": True, **sampling}
    answer = httpx.post(f"{policy.url}/generate", json=body, timeout=60).json()
    assert len(answer["scores"]) == len(answer["step_scores"]) == 48
    columns = ("step_scores", "step_ends", "step_log_probs", "token_counts", "mean_log_probs")
    for scores, ends, log_probs, count, mean in zip(*(answer[name] for name in columns), strict=True):
        assert len(scores) == len(ends) == len(log_probs) - 1
        assert ends == sorted(set(ends)) and all(1 < end <= count for end in ends)
        assert sum(log_probs) / count == pytest.approx(mean)
    # Random bytes that are no text, or may spell a marker, do not come back as the same tokens.
    generated = zip(answer["results"], answer["step_scores"])
    compared = {result: steps for result, steps in generated if steps and not {"\ufffd", "<"} & set(result)}
    assert compared
    for result, steps in compared.items():
        text = {"text": prompt + result, "prompt": prompt, "return_all_scores": True}
        assert httpx.post(f"{scorer.url}/score", json=text).json()["all_scores"] == pytest.approx(steps, abs=1e-4)


BUDGETED = {
    "prefix_prompt": "a.\n\nb", "max_tokens": 100, "response_num": 12, "temperature": 1.0, "top_p": 1.0, "seed": 3,
    "repetition_penalty": 0.2, "return_scores": True, "return_log_probs": True,
}  # fmt: skip
PLAIN_CHANCE = {"slope": 1.0, "intercept": 0.0}


def budgeted(policy, rule: str, **budget: object) -> httpx.Response:
    budget = {"rule": rule, "chance": PLAIN_CHANCE, **budget}
    return httpx.post(f"{policy.url}/generate", json={**BUDGETED, "budget": budget}, timeout=60)


def test_a_budget_changes_nothing_where_it_is_not_used(policy) -> None:
    plain = httpx.post(f"{policy.url}/generate", json=BUDGETED, timeout=60).json()
    for rule in ("stop:0.999999/12", "prune:0.999@1+posterior:0.999999/12"):
        assert budgeted(policy, rule, data_source="make10").json() == plain
    waves = budgeted(policy, "majority:0.99/5", chance=None, data_source="math").json()
    for name in ("results", "token_counts", "finish_reasons"):
        assert waves[name] == plain[name]


def test_a_budget_stops_and_prunes(policy) -> None:
    plain = httpx.post(f"{policy.url}/generate", json=BUDGETED, timeout=60).json()
    answer = budgeted(policy, "prune:0.5@1+stop:0.3/6").json()
    read_responses(json.dumps(answer).encode(), 12)
    reasons = answer["finish_reasons"]
    assert reasons[6:] == ["not_begun"] * 6
    assert 0 < reasons.count("pruned") < 6
    for number, (reason, text, whole) in enumerate(zip(reasons, answer["results"], plain["results"], strict=True)):
        score, steps, count = (answer[name][number] for name in ("scores", "step_scores", "token_counts"))
        if reason == "not_begun":
            assert (text, score, steps, count, answer["mean_log_probs"][number]) == ("", None, [], 0, None)
            assert (answer["step_ends"][number], answer["step_log_probs"][number]) == ([], [0.0])
        elif reason == "pruned":
            assert whole.startswith(text) and text.endswith(".\n\n")
            assert (score, len(steps)) == (None, 1)
            assert 0 < answer["step_ends"][number][0] <= count <= plain["token_counts"][number]
        else:
            assert (text, reason, count) == (whole, *(plain[n][number] for n in ("finish_reasons", "token_counts")))
            assert score == pytest.approx(plain["scores"][number], abs=1e-5)
    without_scores = {**BUDGETED, "return_scores": False, "budget": {"rule": "prune:0.5@1"}}
    assert "pruned" in httpx.post(f"{policy.url}/generate", json=without_scores, timeout=60).json()["finish_reasons"]


@pytest.mark.parametrize(
    ("rule", "budget", "detail"),
    [
        ("half:0.5", {}, r"budget.rule: .*write stop:CHANCE"),
        ("stop:0.9", {"chance": None}, r"budget.chance: stop:0.9/1 needs one, or a calibrated model"),
        ("stop:0.9", {"chance": {"slope": -1.0, "intercept": 0.0}}, r"budget.chance.slope"),
        ("posterior:0.9", {}, r"budget.data_source: posterior:0.9/1 needs it"),
        ("majority:0.9", {"data_source": "riddles"}, r"budget.data_source 'riddles': no grader"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(policy, rule: str, budget: dict, detail: str) -> None:
    answer = budgeted(policy, rule, **budget)
    assert answer.status_code == 422
    assert re.search(detail, answer.json()["detail"])


def test_generate_refusals(policy) -> None:
    for fields, status in (
        ({"prefix_prompt": "x" * 512}, 413),
        ({"prefix_prompt": "x", "response_num": 0}, 422),
        ({"prefix_prompt": "x", "max_tokens": "many"}, 422),
    ):
        answer = httpx.post(f"{policy.url}/generate", json=fields, timeout=60)
        assert answer.status_code == status
        assert isinstance(answer.json()["detail"], str)


def test_a_flood_is_answered_or_told_to_come_back(scorer) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(lambda _: httpx.post(f"{scorer.url}/score_batch", json={"texts": TEXTS}, timeout=60), range(24))
        )
    assert {answer.status_code for answer in answers} <= {200, 429}
    values = [answer.json()["values"] for answer in answers if answer.status_code == 200]
    assert values and all(value == pytest.approx(values[0], abs=1e-5) for value in values)
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)


@pytest.mark.long
def test_a_service_whose_stderr_nobody_reads_goes_on(reserve_port: Callable[[], int], tiny_model_dir: Path) -> None:
    url = f"http://127.0.0.1:{(port := reserve_port())}"
    script = str(REPOSITORY / "test/score_model_queue.py")
    command = [sys.executable, script, "--model_path", str(tiny_model_dir), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as service, httpx.Client(timeout=60) as client:
        try:
            deadline = time.monotonic() + 200
            while service.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{url}/ready").is_success:
                        break
                time.sleep(0.1)
            for _ in range(600):
                assert client.post(f"{url}/score", json={"text": "x"}).is_success
            service.terminate()
            assert service.wait(60) == 0
        finally:
            service.kill()


def test_openapi_documents_the_routes(policy, scorer) -> None:
    assert "/generate" in httpx.get(f"{policy.url}/openapi.json").json()["paths"]
    assert {"/score", "/score_batch"} <= httpx.get(f"{scorer.url}/openapi.json").json()["paths"].keys()


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("score_model_queue.py", ["--model_path", "{model}", "--score_model_dim", "1536"], "has hidden_size 64"),
        ("score_model_queue.py", ["--model_path", "{model}", "--port", "{busy}"], "cannot listen there"),
        ("policy_model_queue.py", ["--model_path", "{model}", "--port", "{busy}"], "cannot listen there"),
        ("policy_model_queue.py", ["--model_path", "/nowhere"], "/nowhere/config.json: no such file"),
        ("policy_model_queue.py", ["--model_path", "{model}", "--port", "0", "--engine", "abacus"], "abacus"),
        ("score_model_queue.py", ["--model_path", "{model}", "--port", "0", "--lang", "zh"], "not lang=zh"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    script: str, arguments: list[str], expected: str, tiny_model_dir: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        names = {"model": str(tiny_model_dir), "busy": str(busy.getsockname()[1])}
        command = [sys.executable, str(REPOSITORY / "test" / script), *(item.format(**names) for item in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(errors) == 1 and expected in errors[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_broken_chat_template_is_one_line_and_a_refusing_one_is_no_obstacle(
    start_service: Callable, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("sprm_config.json"))
    template = model / "chat_template.jinja"
    template.write_text("{% for message in messages %}", encoding="utf-8")
    broken = start_service("score_model_queue.py", "--model_path", str(model))
    assert broken.wait() == 2
    (error,) = (line for line in broken.log.read_text(encoding="utf-8").splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {model}: the chat template fails in its line 1: TemplateSyntaxError: ")
    assert "Traceback" not in broken.log.read_text(encoding="utf-8")

    template.write_text("{{ raise_exception('the first message must be the system') }}", encoding="utf-8")
    url = start_service("score_model_queue.py", "--model_path", str(model)).wait_ready().url
    assert 0 < httpx.post(f"{url}/score", json={"text": "So it is.\n\nAnd so on.\n\n"}).json()["value"] < 1


def ask_for_a_while(url: str, responses: int) -> Future[httpx.Response]:
    """A request that the service has begun."""
    body = {"prefix_prompt": PROMPT, "max_tokens": 400, "response_num": responses, "temperature": 1.2}
    answer: Future[httpx.Response] = Future()

    def ask() -> None:
        try:
            answer.set_result(httpx.post(f"{url}/generate", json=body, timeout=200))
        except httpx.TransportError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    while f"xbai_queue_items {responses}.0" not in httpx.get(f"{url}/metrics").text:
        assert not answer.done(), "the request ended before the signal"
    return answer


def test_sigterm_finishes_running_work_and_exits_0(policy) -> None:
    answer = ask_for_a_while(policy.url, 64)
    policy.process.send_signal(signal.SIGTERM)
    refused = httpx.post(f"{policy.url}/generate", json={"prefix_prompt": PROMPT})
    assert (refused.status_code, refused.json()["detail"]) == (503, "the service is stopping")
    assert httpx.get(f"{policy.url}/ready").status_code == 503
    assert policy.wait() == 0
    assert len(answer.result(200).json()["results"]) == 64
    entries = [json.loads(line) for line in policy.log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    (entry,) = (entry for entry in entries if entry.get("responses") == 64)
    assert (entry["route"], entry["status"]) == ("/generate", 200)
    assert entry["tokens"] > 64


@pytest.mark.long
def test_a_second_sigterm_ends_at_once(start_service: Callable, tiny_model_dir: Path) -> None:
    service = start_service("policy_model_queue.py", "--model_path", str(tiny_model_dir), "--engine", "hf").wait_ready()
    answer = ask_for_a_while(service.url, 1024)
    service.process.send_signal(signal.SIGTERM)
    while httpx.get(f"{service.url}/ready").is_success:
        assert not answer.done()
    assert service.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    with pytest.raises(httpx.TransportError):
        answer.result(60)


def test_sigterm_ends_a_service_that_is_still_loading(start_service: Callable, tiny_model_dir: Path) -> None:
    service = start_service("policy_model_queue.py", "--model_path", str(tiny_model_dir), "--engine", "hf")
    while "Application startup complete" not in service.log.read_text(encoding="utf-8"):
        assert service.process.poll() is None
        time.sleep(0.01)
    assert httpx.get(f"{service.url}/ready").status_code == 503
    assert service.stop() == 0
    assert "loading cannot be interrupted" in service.log.read_text(encoding="utf-8")


@pytest.fixture
def shared_policy(start_service: Callable, tiny_model_dir: Path):
    """A policy service whose model is in two worker processes, and these with whatever they started."""
    arguments = ["--model_path", str(tiny_model_dir), "--engine", "vllm", "--tensor_parallel_size", "2"]
    service = start_service("policy_model_queue.py", *arguments).wait_ready()
    children = psutil.Process(service.process.pid).children(recursive=True)
    # Python's own ends by itself when all the others have.
    workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    assert len(workers) >= 2
    yield service, workers
    for worker in workers:
        if worker.is_running():
            worker.kill()


@pytest.mark.long
def test_a_signal_to_all_processes_leaves_the_workers_to_the_service(shared_policy) -> None:
    service, workers = shared_policy
    answer = ask_for_a_while(service.url, 64)
    for process in (*workers, service.process):
        process.send_signal(signal.SIGINT)
    assert len(answer.result(200).json()["results"]) == 64
    assert service.wait() == 0
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.long
def test_workers_that_hang_end_with_the_service(shared_policy) -> None:
    service, workers = shared_policy
    answer = ask_for_a_while(service.url, 1024)
    for worker in workers:
        worker.suspend()
    for _ in range(2):
        service.process.send_signal(signal.SIGTERM)
        time.sleep(1)
    assert service.wait() == 128 + signal.SIGTERM
    with pytest.raises(httpx.TransportError):
        answer.result(60)
    assert not psutil.wait_procs(workers, timeout=60)[1]
