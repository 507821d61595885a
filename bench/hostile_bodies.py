"""Bodies made to freeze a service or to fill its memory, and what everybody else feels meanwhile.

    python bench/hostile_bodies.py --policy_url http://HOST:PORT --score_url http://HOST:PORT [--rounds 30]
        [--at_once 4] [--megabytes 15] [--seed 0]

A round sends some bodies at once, while `/health` of both is asked 20 times a second over connections of its own.
Before and after all rounds both services are asked something honest. The last line is one JSON object.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated
from urllib.parse import urlsplit

import typer

PROBE_EVERY_S = 0.05
HEALTH_LIMIT_S = 1.0
ANSWER_LIMIT_S = 120.0
LARGEST_REFUSAL_BYTES = 16 << 10
PROMPT = "<|im_start|>user\nMake 10 from 7 8 1 1 5<|im_end|>\n<|im_start|>assistant\n"
STEPS = "7 and 1 is 8.\n\nSo 3"
HONEST = {
    "/generate": {"prefix_prompt": PROMPT, "max_tokens": 4, "response_num": 2, "seed": 1},
    "/score": {"text": PROMPT + STEPS, "return_all_scores": True},
}
BUSY = frozenset({429})
UNREADABLE, REFUSED, TOO_LONG, HEAVY = ({400, 422}, {422}, {413}, {200, 413})


@dataclass(frozen=True)
class HostileBody:
    """What is sent where, and the statuses that are right."""

    kind: str
    route: str
    body: bytes
    statuses: frozenset[int]


@dataclass
class Damage:
    """What hostile bodies did.

    Attributes:
        hostile_bodies: how many were sent; `statuses` are their answers.
        lost: they got no answer.
        silently_wrong: they got an answer of a status that is not theirs, or a refusal that echoes them, or an honest
            request got another answer afterwards than before.
        hung: they had no answer in `ANSWER_LIMIT_S`, and probes of `/health` that took more than `HEALTH_LIMIT_S`.
        longest_health_s, longest_health_kind: the slowest probe, and what was sent meanwhile.
        largest_refusal_bytes: of the answers that are errors.
        complaints: what was not as it should be.
    """

    hostile_bodies: int = 0
    lost: int = 0
    silently_wrong: int = 0
    hung: int = 0
    longest_health_s: float = 0.0
    longest_health_kind: str = ""
    longest_answer_s: float = 0.0
    largest_refusal_bytes: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


def hostile_bodies(size: int, rng: random.Random) -> list[HostileBody]:
    """One body of each kind, of about `size` bytes each where it is size that hurts."""

    def fill(pattern: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
        return before + pattern * ((size - len(before) - len(after)) // len(pattern)) + after

    def keys(count: int) -> bytes:
        first = rng.randrange(1 << 24)
        return b'{"' + b'":0,"'.join(b"%x" % (first + i) for i in range(count)) + b'":0}'

    generate = b'{"max_tokens":4,"response_num":1,"prefix_prompt":"x",'
    prompt, text, texts = b'{"prefix_prompt":"', b'{"text":"', b'{"texts":['
    count = rng.randrange(900, 1025)
    honest_text = json.dumps(PROMPT + STEPS).encode()
    long_text = json.dumps(PROMPT + "7" * (size // 1024 - 90)).encode()
    word = rng.choice([b"a", b"7", b", ", b"\\n", b"[{"])
    made = [
        ("unknown keys", "/generate", keys(size // 12), REFUSED),
        ("unknown keys", "/score", keys(size // 12), REFUSED),
        ("as many unknown keys as are read", "/score", keys(4000), REFUSED),
        ("one long key", "/score", fill(b"k", b'{"text":"x","', b'":0}'), REFUSED),
        ("texts that are numbers", "/score_batch", fill(b"1,", texts, b"1]}"), REFUSED),
        ("a full batch of numbers", "/score_batch", texts + b"1," * count + b"1]}", REFUSED),
        ("empty lists", "/score_batch", fill(b"[],", texts, b"[]]}"), REFUSED),
        ("stop texts that are numbers", "/generate", fill(b"1,", generate + b'"stop":[', b"1]}"), REFUSED),
        ("stop tokens that are texts", "/generate", fill(b'"a",', generate + b'"stop_token_ids":[', b"1]}"), REFUSED),
        ("4096 texts for tokens", "/generate", generate + b'"stop_token_ids":[' + b'"a",' * 4095 + b'"a"]}', REFUSED),
        ("objects in objects", "/score", fill(b'{"text":'), UNREADABLE),
        ("lists in a text", "/score", fill(b"[", b'{"text":'), UNREADABLE),
        ("lists 9000 deep", "/score", b'{"text":' + b"[" * 9000 + b"]" * 9000 + b"}", UNREADABLE),
        ("a key again and again", "/score", fill(b'"text":"x",', b"{", b'"text":"x"}'), REFUSED),
        ("a long prompt", "/generate", fill(word, prompt, b'"}'), TOO_LONG),
        ("a long text of emoji", "/score", fill("😀".encode(), text, b'"}'), TOO_LONG),
        ("one emoji after a long text", "/score", fill(b"a", text, "😀".encode() + b'"}'), TOO_LONG),
        ("escapes", "/generate", fill(b"\\u0041", prompt, b'"}'), TOO_LONG),
        ("escaped pairs", "/score", fill(b"\\ud83d\\ude00", text, b'"}'), TOO_LONG),
        ("half a pair in a key", "/score", b'{"text":"x","\\ud83d":0}', REFUSED),
        ("half a pair at the end", "/score", fill(b"a", text, b'\\ud83d"}'), REFUSED),
        ("almost chat headers", "/score", fill(b"<|im_start|>assistant", text, b'"}'), TOO_LONG),
        ("quotes", "/score", fill(b'"'), UNREADABLE),
        ("backslashes in a text", "/score", fill(b"\\", text), UNREADABLE),
        ("spaces", "/score", fill(b" ", b"{", b"}"), REFUSED),
        ("a long number", "/generate", fill(b"9", generate + b'"seed":', b"}"), REFUSED),
        ("a long fraction", "/generate", fill(b"9", generate + b'"temperature":0.', b"}"), REFUSED),
        ("noise", "/score", rng.randbytes(size), UNREADABLE),
        ("texts with step scores", "/score_batch", texts + b",".join([honest_text] * count) + b"]}", HEAVY),
        ("long texts", "/score_batch", texts + b",".join([long_text] * count) + b"]}", HEAVY),
    ]
    return [HostileBody(kind, route, body, frozenset(statuses) | BUSY) for kind, route, body, statuses in made]


def attack(
    policy_url: str,
    score_url: str,
    *,
    rounds: int,
    at_once: int = 4,
    size: int = 15_000_000,
    seed: int = 0,
    api_key: str | None = None,
) -> Damage:
    """Attack two running services.

    Args:
        policy_url, score_url: `http://HOST:PORT` of each.
        rounds: how often bodies are sent; in as many as there are kinds, each kind has its turn.
        at_once: bodies of a round; half of them are of the kind whose turn it is, the others are drawn.
        size: bytes of each body whose size matters.
        seed: of what is drawn.
        api_key: the services'.
    """
    attacker = _Attacker({"/generate": policy_url, "/score": score_url, "/score_batch": score_url}, api_key)
    rng = random.Random(seed)
    before = attacker.honest_answers()
    waiting: list[int] = []
    for _ in range(rounds):
        made = hostile_bodies(size, rng)
        if not waiting:
            waiting = rng.sample(range(len(made)), len(made))
        turn = made[waiting.pop()]
        attacker.send([turn] * (at_once - at_once // 2) + rng.choices(made, k=at_once // 2))
    if attacker.honest_answers() != before:
        attacker.damage.silently_wrong += 1
        attacker.damage.complaints.append("an honest request is not answered as before")
    return attacker.damage


class _Attacker:
    def __init__(self, urls: dict[str, str], api_key: str | None) -> None:
        self._urls = urls
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self.damage = Damage()

    def honest_answers(self) -> dict[str, object]:
        """What both services answer to `HONEST`."""
        answers = {}
        for route, body in HONEST.items():
            status, answer = self._ask(route, json.dumps(body).encode())
            answers[route] = status, json.loads(answer)
        return answers

    def send(self, bodies: list[HostileBody]) -> None:
        """All at once, with `/health` watched."""
        kinds = " + ".join(sorted({body.kind for body in bodies}))
        with self._watched(kinds), ThreadPoolExecutor(len(bodies)) as clients:
            list(clients.map(self._send_one, bodies))

    def _send_one(self, hostile: HostileBody) -> None:
        started = time.monotonic()
        try:
            status, answer = self._ask(hostile.route, hostile.body)
        except TimeoutError:
            outcome, status, answer = "hung", 0, b""
        except (OSError, http.client.HTTPException) as error:
            outcome, status, answer = "lost", 0, repr(error).encode()
        else:
            echoes = status != 200 and len(answer) > LARGEST_REFUSAL_BYTES
            outcome = "" if status in hostile.statuses and not echoes else "silently_wrong"
        with self._lock:
            damage = self.damage
            damage.hostile_bodies += 1
            damage.statuses[status] = damage.statuses.get(status, 0) + 1
            damage.longest_answer_s = max(damage.longest_answer_s, time.monotonic() - started)
            if status != 200:
                damage.largest_refusal_bytes = max(damage.largest_refusal_bytes, len(answer))
            if outcome:
                setattr(damage, outcome, getattr(damage, outcome) + 1)
                said = answer[:200].decode("latin-1")
                damage.complaints.append(f"{hostile.kind}: {outcome}, status {status}, {said}")

    def _ask(self, route: str, body: bytes) -> tuple[int, bytes]:
        connection = _connect(self._urls[route])
        try:
            connection.request("POST", route, body, self._headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    @contextmanager
    def _watched(self, kind: str) -> Iterator[None]:
        over = threading.Event()
        probes = [threading.Thread(target=self._probe, args=(url, kind, over)) for url in {*self._urls.values()}]
        for probe in probes:
            probe.start()
        try:
            yield
        finally:
            over.set()
            for probe in probes:
                probe.join()

    def _probe(self, url: str, kind: str, over: threading.Event) -> None:
        while not over.wait(PROBE_EVERY_S):
            started = time.monotonic()
            complaint = _health(url)
            seconds = time.monotonic() - started
            with self._lock:
                if seconds > self.damage.longest_health_s:
                    self.damage.longest_health_s, self.damage.longest_health_kind = seconds, kind
                if complaint or seconds > HEALTH_LIMIT_S:
                    self.damage.hung += 1
                    self.damage.complaints.append(f"{kind}: /health took {seconds:.2f} s {complaint}".strip())


def _health(url: str) -> str:
    connection = _connect(url)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        return "" if answer.status == 200 else f"and says {answer.status}"
    except (OSError, http.client.HTTPException) as error:
        return f"and fails: {error!r}"
    finally:
        connection.close()


def _connect(url: str) -> http.client.HTTPConnection:
    place = urlsplit(url)
    return http.client.HTTPConnection(place.hostname, place.port, timeout=ANSWER_LIMIT_S)


def main(
    policy_url: Annotated[str, typer.Option("--policy_url")],
    score_url: Annotated[str, typer.Option("--score_url")],
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 30,
    at_once: Annotated[int, typer.Option("--at_once", min=1)] = 4,
    megabytes: Annotated[float, typer.Option("--megabytes", min=0.1)] = 15.0,
    seed: int = 0,
    api_key: Annotated[str | None, typer.Option("--api_key")] = None,
) -> None:
    """Attack two running services and print the damage."""
    size = int(megabytes * 1e6)
    damage = attack(policy_url, score_url, rounds=rounds, at_once=at_once, size=size, seed=seed, api_key=api_key)
    typer.echo(json.dumps(asdict(damage)))


if __name__ == "__main__":
    typer.run(main)
