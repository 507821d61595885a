"""Copies that answer what no service of their kind does, over real sockets: none of it is kept, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response

from xbai.client import replicas
from xbai.client.replicas import RetryPolicy
from xbai.client.wire import (
    BrokenAnswerError,
    ReadyAnswer,
    ReportedFailureError,
    read_answer,
    read_responses,
    read_score,
)
from xbai.errors import UserError
from xbai.infer.options import RunOptions
from xbai.infer.run import run
from xbai.results.lines import read_result_lines

QUESTIONS = 60
SAMPLES = 4
MARK = "from the broken copy"
HTML = b"<!DOCTYPE html>\n<html><body>Welcome, \x1b[31mfrom the broken copy</body></html>"
NOT_JSON_OBJECTS = {
    "html": HTML,
    "a list": b'["from the broken copy"]',
    "null": b"null",
    "nothing": b"",
    "a number of 5000 digits": b"9" * 5000,
    "deep nesting": b'{"results":' + b"[" * 200_000,
    "bytes": b"\xff\xfe\x00",
}
GENERATED = NOT_JSON_OBJECTS | {
    "other fields": b'{"text": "from the broken copy"}',
    "one text for several": json.dumps({"results": MARK}).encode(),
    "too few": json.dumps({"results": [MARK]}).encode(),
    "numbers for texts": b'{"results": [1, 2, 3, 4]}',
    "nulls for texts": b'{"results": [null, null, null, null]}',
    "half a pair": b'{"results": ["from the broken copy \\ud800", "b", "c", "d"]}',
    "half a pair in bytes": b'{"results": ["from the broken copy \xed\xa0\x80", "b", "c", "d"]}',
    "a log-prob that is NaN": b'{"results": ["a", "b", "c", "d"], "mean_log_probs": [NaN, 0, 0, 0]}',
    "a short column": b'{"results": ["a", "b", "c", "d"], "token_counts": [1]}',
    "texts for counts": b'{"results": ["a", "b", "c", "d"], "token_counts": ["1", "1", "1", "1"]}',
    "half a pair for a reason": b'{"results": ["a", "b", "c", "d"], "finish_reasons": ["\\udfff", "", "", ""]}',
}
OF_OTHER_STEPS = {
    **{
        f"ends of steps, {ends}": f'{{"results": ["a", "b", "c", "d"], "token_counts": [9, 9, 9, 9], '
        f'"step_scores": [[], [0.5, 0.5], [], []], "step_ends": [[], {ends}, [], []]}}'.encode()
        for ends in ([5], [5, 5], [3, 10])
    },
    "log-probs of other steps": b'{"results": ["a", "b", "c", "d"], "step_ends": [[2], [], [], []], '
    b'"step_log_probs": [[-1.0], [], [], []]}',
}
SCORES = NOT_JSON_OBJECTS | {
    "other fields": b'{"score": 0.666}',
    "NaN": b'{"value": NaN, "all_scores": [0.666]}',
    "infinity": b'{"value": 1e999}',
    "a text": b'{"value": "0.666"}',
    "a truth": b'{"value": true}',
    "null for a score": b'{"value": null, "all_scores": []}',
    "NaN in steps": b'{"value": 0.666, "all_scores": [NaN]}',
    "a text in steps": b'{"value": 0.666, "all_scores": ["0.666"]}',
    "a number for steps": b'{"value": 0.666, "all_scores": 1}',
}
READY = NOT_JSON_OBJECTS | {
    "a number for an identity": b'{"identity": 5, "scores": false}',
    "half a pair": b'{"identity": "m\\ud800:1a"}',
}


class Copy:
    """A policy and score service in one, as it should be but for the routes whose answers are given."""

    def __init__(self, **bodies: bytes) -> None:
        self.app = FastAPI()
        self.asked = {"ready": 0, "generate": 0, "score": 0}

        @self.app.get("/{route}")
        @self.app.post("/{route}")
        async def answer(route: str, request: Request) -> Response:
            self.asked[route] += 1
            body = bodies.get(route)
            if body is None:
                body = json.dumps(getattr(self, route)(json.loads(await request.body() or b"{}"))).encode()
            return Response(body, media_type="application/json")

    def ready(self, body: dict) -> dict:
        return {"status": "ready", "identity": "m:1a", "lang": "en", "scores": False}

    def generate(self, body: dict) -> dict:
        return {"results": [f"{body['seed']}/{i} {{good}}" for i in range(body["response_num"])]}

    def score(self, body: dict) -> dict:
        return {"value": 0.25, "all_scores": [0.25]}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "RETRY_BASE_S", 0.01)


@pytest.fixture
def infer(serve_app: Callable[[FastAPI], str], tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """`infer(policy copies, score copies) -> result file`."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"Make 10 from {n} 5", "answer": f"{n} 5"} for n in range(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def infer(policies: list[Copy], scorers: list[Copy]) -> Path:
        policy, scorer = (",".join(serve_app(copy.app) for copy in copies) for copies in (policies, scorers))
        options = RunOptions(
            "make10", str(questions), str(tmp_path / "out.jsonl"), str(tiny_model_dir), policy, scorer or None,
            n_samples=SAMPLES, response_num=SAMPLES, max_in_flight=1, seed=0,
            score_source="service" if scorers else "none", retry=RetryPolicy(patience_s=30),
        )  # fmt: skip
        return run(options)

    return infer


@pytest.mark.parametrize(
    ("read", "body"),
    [
        *(
            (lambda body: read_responses(body, SAMPLES, "finish_reasons", "token_counts"), body)
            for body in (GENERATED | OF_OTHER_STEPS).values()
        ),
        *((read_score, body) for body in SCORES.values()),
        *((lambda body: read_answer(ReadyAnswer, body), body) for body in READY.values()),
    ],
    ids=[*GENERATED, *OF_OTHER_STEPS, *SCORES, *READY],
)
def test_what_is_no_answer_is_said_shortly_in_one_line(read: Callable[[bytes], object], body: bytes) -> None:
    with pytest.raises(BrokenAnswerError) as caught:
        read(body)
    assert len(str(caught.value)) < 1200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("error", [b'"out of memory"', b'{"code": 5}', b"[5]"])
def test_what_a_service_reports_is_no_answer(error: bytes) -> None:
    with pytest.raises(ReportedFailureError, match=r"out of memory|5"):
        read_responses(b'{"results": ["a", "b", "c", "d"], "error": ' + error + b"}", SAMPLES)


def test_broken_copies_are_set_aside_and_the_run_goes_on(infer: Callable[..., Path]) -> None:
    policies = [Copy(generate=body) for body in GENERATED.values()]
    scorers = [Copy(score=body) for body in SCORES.values()]
    never_ready = [Copy(ready=body) for body in READY.values()]
    path = infer([*policies, *never_ready, Copy()], [*scorers, *never_ready, Copy()])
    lines = list(read_result_lines(path))
    assert len(lines) == QUESTIONS
    for line in lines:
        assert all(response.endswith("{good}") for response in line.responses)
        assert [sample.score for sample in line.samples] == [0.25] * SAMPLES
    assert all(copy.asked["generate"] for copy in policies)
    assert all(copy.asked["score"] for copy in scorers)
    assert all(copy.asked["ready"] > 1 for copy in never_ready), "they are tried again"
    assert not any(copy.asked["generate"] or copy.asked["score"] for copy in never_ready)


@pytest.mark.parametrize(
    ("route", "body", "problem"),
    [
        ("ready", HTML, r"no answer of /ready: Invalid JSON: .*<!DOCTYPE html>.*\\x1b\[31mfrom the broken"),
        ("ready", b"null", r"no answer of /ready: Input should be an object, in 'null'"),
        ("generate", b"[1]", r"no answer of /generate: Input should be an object, in '\[1\]'"),
        ("generate", GENERATED["half a pair"], r"no answer of /generate: Invalid JSON: .*copy \\\\ud800"),
        (
            "generate",
            b'{"results": ["a"]}',
            r"no answer of /generate: results: 1 items for the 4 responses that were asked for",
        ),
    ],
    ids=["html", "null", "a list", "half a pair", "too few"],
)
def test_where_all_copies_are_broken_the_run_ends_with_one_line(
    infer: Callable[..., Path], tmp_path: Path, route: str, body: bytes, problem: str
) -> None:
    copies = [Copy(**{route: body}), Copy(**{route: body})]
    with pytest.raises(UserError, match=rf"^http://[0-9.]+:\d+, http://[0-9.]+:\d+: {problem}") as caught:
        infer(copies, [])
    assert str(caught.value).endswith("; is this the right service?")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out.jsonl").exists()
    assert '"response"' not in (tmp_path / "out.jsonl.journal").read_text(encoding="utf-8")


def test_where_all_score_services_are_broken_responses_are_kept(
    infer: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = infer([Copy()], [Copy(score=SCORES["NaN"])])
    assert [[sample.score for sample in line.samples] for line in read_result_lines(path)] == [
        [None] * SAMPLES
    ] * QUESTIONS
    said = [record.getMessage() for record in caplog.records if "no more scores" in record.getMessage()]
    (line,) = said
    assert "http://127.0.0.1:" in line
    assert "value: Input should be a finite number" in line


def test_a_copy_that_answers_others_well_is_not_given_up(infer: Callable[..., Path], tmp_path: Path) -> None:
    class Picky(Copy):
        def generate(self, body: dict) -> dict:
            good = super().generate(body)
            return {"results": None} if "from 7 5" in body["prefix_prompt"] else good

    with pytest.raises(UserError, match="4 samples are missing, on which the service failed each time"):
        infer([Picky()], [])
    lines = list(read_result_lines(tmp_path / "out.jsonl"))
    assert [len(line.responses) for line in lines] == [0 if index == 7 else SAMPLES for index in range(QUESTIONS)]


@pytest.mark.parametrize(
    "detail",
    [b'{"detail": "\\ud800 too\\nlong"}', b'{"detail":' + b"[" * 200_000, b"\xff" * 99],
    ids=["half a pair", "deep", "bytes"],
)
def test_what_a_refusal_says_can_be_kept(infer: Callable[..., Path], serve_app: Callable, detail: bytes) -> None:
    copy = Copy()
    app = FastAPI()
    app.get("/ready")(lambda: copy.ready({}))
    app.post("/generate")(lambda: Response(detail, 413))
    copy.app = app
    for line in read_result_lines(infer([copy], [])):
        assert [sample.finish_reason for sample in line.samples] == ["refused"] * SAMPLES
        assert all(sample.error.startswith("413: ") and sample.error.isprintable() for sample in line.samples)
