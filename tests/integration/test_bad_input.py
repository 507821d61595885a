"""Both services on a real model, against whatever may arrive on their ports: no 5xx, no hang, nothing left behind."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from clocks import wait_until
from fastapi import FastAPI

from xbai.engine import Scorer, load_engine
from xbai.model_folder import load_tokenizer
from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.policy import create_policy_app
from xbai.serve.score import create_score_app
from xbai.serve.scorer_thread import ScoreModel, ScorerThread

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[1] / "schemathesis.toml"
MAX_MODEL_LEN = 24
KEY = {"Authorization": "Bearer secret"}
JSON = {"Content-Type": "application/json", **KEY}


def policy_app(engine: str, folder: Path) -> FastAPI:
    thread = EngineThread(lambda: load_engine(engine, folder, max_model_len=MAX_MODEL_LEN, max_num_seqs=512))
    return create_policy_app(thread, "tiny", Limits(api_key="secret"))


def score_app(folder: Path) -> FastAPI:
    tokenizer = load_tokenizer(folder)
    thread = ScorerThread(lambda: ScoreModel(Scorer.from_folder(folder), tokenizer, MAX_MODEL_LEN))
    return create_score_app(thread, "tiny", Limits(api_key="secret"))


@pytest.fixture(params=["hf", pytest.param("vllm", marks=pytest.mark.long), "score"])
def service(
    request: pytest.FixtureRequest, serve_app: Callable[[FastAPI], str], tiny_model_dir: Path
) -> Iterator[tuple[str, str, str]]:
    """URL, route and text field of one service; after the test, it still answers and nothing is queued."""
    is_policy = request.param != "score"
    url = serve_app(policy_app(request.param, tiny_model_dir) if is_policy else score_app(tiny_model_dir))
    wait_until(lambda: httpx.get(f"{url}/ready", headers=KEY).is_success, "the service is ready", 240)
    route, field = ("/generate", "prefix_prompt") if is_policy else ("/score", "text")
    yield url, route, field
    assert httpx.post(url + route, json={field: "one.\n\ntwo"}, headers=KEY).is_success
    assert "xbai_queue_items 0.0" in httpx.get(f"{url}/metrics", headers=KEY).text


def keeps_to_its_schema(url: str, folder: Path, *options: str) -> str:
    """What schemathesis says, which finds nothing wrong."""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG)),
        *("run", f"{url}/openapi.json", "--header", f"Authorization: {KEY['Authorization']}"),
        *("--checks", "all", "--max-examples", "20", "--seed", "0", *options),
        *("--max-response-time", "30", "--request-timeout", "30", "--continue-on-failure", "--no-color"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "service", ["hf", *(pytest.param(name, marks=pytest.mark.long) for name in ("vllm", "score"))], indirect=True
)
def test_the_services_keep_to_their_schema(service: tuple[str, str, str], tmp_path: Path) -> None:
    url, route, _ = service
    but_openais = ("--exclude-path-regex", "^/v1/") if route == "/generate" else ()
    said = keeps_to_its_schema(url, tmp_path, "--phases", "coverage,fuzzing", *but_openais)
    assert "No issues found" in said, said


@pytest.mark.parametrize("phases", ["fuzzing", pytest.param("coverage,fuzzing", marks=pytest.mark.long)])
@pytest.mark.parametrize("service", ["hf", pytest.param("vllm", marks=pytest.mark.long)], indirect=True)
def test_openais_routes_keep_to_their_schema(service: tuple[str, str, str], tmp_path: Path, phases: str) -> None:
    # A schema cannot say which models, efforts and messages there are, so that much that keeps to it is refused.
    unknown = ("--include-path-regex", "^/v1/", "--exclude-checks", "positive_data_acceptance")
    keeps_to_its_schema(service[0], tmp_path, "--phases", phases, *unknown)


def test_hostile_bodies(service: tuple[str, str, str]) -> None:
    url, route, field = service
    name = field.encode()
    cases: list[tuple[bytes, dict[str, str], set[int]]] = [
        (b"", JSON, {422}),
        (b"null", JSON, {422}),
        (b"[" * 100_000, JSON, {400, 422}),
        (b'{"a":' * 100_000, JSON, {400, 422}),
        (b'{"' + name + b'": "\xff\xfe"}', JSON, {422}),
        (b'{"' + name + b'": "\\ud800"}', JSON, {422}),
        (b'{"' + name + b'": ""}', JSON, {422}),
        (b'{"' + name + b'": 1e400}', JSON, {422}),
        (b'{"' + name + b'": "x", "' + name + b'": "y"}', JSON, {200}),
        (b'{"' + name + b'": "x", "unknown": NaN}', JSON, {422}),
        (b'{"' + name + b'": "\\u0000<|endoftext|><|im_end|>"}', JSON, {200}),
        (b'{"' + name + b'": "' + b"x" * 10_000_000 + b'"}', JSON, {413}),
        (b'{"' + name + b'": "' + b"x" * (17 << 20) + b'"}', JSON, {413}),
        (b'{"' + name + b'": "x"}', {"Content-Type": "text/plain", **KEY}, {422}),
        (b'{"' + name + b'": "x"}', {"Content-Type": "application/json; charset=utf-16", **KEY}, {200}),
        (b'{"' + name + b'": "x"}', KEY, {422}),
        (b"\x1f\x8b\x08", {"Content-Encoding": "gzip", **JSON}, {422}),
    ]
    with httpx.Client(timeout=60) as client:
        for body, headers, statuses in cases:
            answer = client.post(url + route, content=body, headers=headers)
            assert answer.status_code in statuses, (body[:80], answer.status_code, answer.text[:200])
            assert answer.is_success or isinstance(answer.json()["detail"], str)
        chunks = (b"x" * (1 << 20) for _ in range(20))
        assert client.post(url + route, content=chunks, headers=JSON).status_code == 413


@pytest.mark.parametrize("service", ["hf", "vllm"], indirect=True)
def test_hostile_numbers(service: tuple[str, str, str]) -> None:
    url, _, _ = service
    accepted = [
        ("temperature", "1e-320"), ("temperature", "0.001"), ("temperature", "2"), ("top_p", "1e-320"),
        ("repetition_penalty", "0.01"), ("repetition_penalty", "10"), ("max_tokens", str(2**31 - 1)),
        ("seed", str(2**63 - 1)), ("top_k", str(2**31 - 1)), ("response_num", "1024"), ("stop", '"never \\u2603"'),
        ("stop_token_ids", "[]"), ("stop_token_ids", "[0, 0]"), ("stop_token_ids", str([0] * 4096)),
    ]  # fmt: skip
    refused = [
        ("temperature", "-1e-9"), ("temperature", "NaN"), ("temperature", "1e400"), ("top_p", "0"), ("top_p", "-1"),
        ("repetition_penalty", "1e-320"), ("max_tokens", "-1"), ("max_tokens", "1e99"), ("max_tokens", "9" * 5000),
        ("seed", str(2**63)), ("response_num", "1025"), ("response_num", "0"), ("stop", "[]" * 2), ("stop", '[""]'),
        ("stop", json.dumps(["x"] * 17)), ("stop", json.dumps("x" * 257)), ("return_scores", "1"),
        ("stop_token_ids", "[999999999]"), ("stop_token_ids", "[-1]"), ("stop_token_ids", str([0] * 4097)),
    ]  # fmt: skip
    with httpx.Client(timeout=60, headers=JSON) as client:
        for cases, statuses in ((accepted, {200}), (refused, {400, 422})):
            for field, value in cases:
                tokens = "" if field == "max_tokens" else ', "max_tokens": 4'
                number = "" if field == "response_num" else ', "response_num": 2'
                body = f'{{"prefix_prompt": "x", "{field}": {value}{tokens}{number}}}'
                answer = client.post(f"{url}/generate", content=body)
                assert answer.status_code in statuses, (field, value, answer.text[:200])


@pytest.mark.parametrize("service", ["hf", "score"], indirect=True)
def test_what_is_not_http(service: tuple[str, str, str]) -> None:
    url, route, _ = service
    port = int(url.rpartition(":")[2])
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\n".encode()
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
        head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nnot a number\r\n",
        head + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    ):
        answer = answer_to(sent + b"\n", port)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), (sent[:60], answer)
    assert httpx.get(f"{url}/health").is_success


def answer_to(sent: bytes, port: int) -> bytes:
    """The beginning of what comes back; nothing, too, where the server hung up before all was sent."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1000)
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
            return b""
