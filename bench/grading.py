"""Answers graded per minute: mathematics and multiple choice, and programs against their tests.

    python bench/grading.py [--answers 4000] [--programs 200] [--workers 2] [--out FILE]

A third of the answers is one number, a third needs computer algebra (every one another expression), a third is a
tuple, an interval, a text or the letter of a choice; half of them is wrong. A program sorts numbers against ten tests.
The processes are started, and the graders imported, before the clock starts. The last line is one JSON object.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from machine import ROOT, describe_machine, report

from xbai.grading import GradeRequest, GraderPool

SEED = 0
TESTS = 10
PROGRAM = "input()\nprint(*sorted(map(int, input().split())))"
REASONING = "Let me think about this step by step.\n\n" * 100


def answer_requests(count: int) -> list[GradeRequest]:
    """Answers as models give them, each with what is right."""
    rng = random.Random(SEED)
    return [_answer(rng, index % 3, right=index % 2 == 0) for index in range(count)]


def _answer(rng: random.Random, kind: int, right: bool) -> GradeRequest:
    a, b = rng.randint(2, 999), rng.randint(2, 99)
    off = 0 if right else 1
    if kind == 0:
        forms = [(f"{a + off}", a), (f"{a + off:03}", a), (f"{a},{b + 100 + off}", f"{a}{b + 100}")]
        answer, truth = rng.choice([*forms, (rf"\dfrac{{{2 * a + off}}}{{{2 * b}}}", rf"\frac{{{a}}}{{{b}}}")])
    elif kind == 1:
        forms = [
            (rf"{b}\sqrt{{{a + off}}}", rf"\sqrt{{{b * b * a}}}"),
            (rf"x^2 + {a + b + off}x + {a * b}", f"(x+{a})(x+{b})"),
            (rf"\frac{{{a}\pi + {off}}}{{{b}}}", rf"\frac{{{a}}}{{{b}}} \pi"),
        ]
        answer, truth = rng.choice(forms)
    else:
        forms = [(f"({a}, {b + off})", f"({a},{b})"), (rf"{'(' if off else '['}{a}, \infty)", rf"[{a},\infty)")]
        forms.append((rf"\text{{{'odd' if off else 'Even'}}}", r"\text{even}"))
        answer, truth = rng.choice(forms)
        if rng.random() < 0.25:
            return GradeRequest("ceval", f"{REASONING}答案：{'B' if off else 'A'}", "A")
    return GradeRequest("math500", f"<think>{REASONING}</think>So it is $\\boxed{{{answer}}}$.", truth)


def program_requests(count: int) -> list[GradeRequest]:
    """Programs that sort, half of them the wrong way."""
    rng = random.Random(SEED)
    requests = []
    for index in range(count):
        cases = []
        for _ in range(TESTS):
            numbers = [rng.randint(0, 10**6) for _ in range(1000)]
            stdin = f"{len(numbers)}\n{' '.join(map(str, numbers))}\n"
            cases.append({"input": stdin, "output": " ".join(map(str, sorted(numbers)))})
        program = PROGRAM if index % 2 == 0 else PROGRAM.replace("int,", "str,")
        requests.append(GradeRequest("livecodebench", f"```python\n{program}\n```", json.dumps({"tests": cases})))
    return requests


def measure(pool: GraderPool, requests: list[GradeRequest], workers: int) -> dict[str, Any]:
    """Seconds, and how many a minute that is."""
    pool.grade(requests[: 3 * workers])
    started = time.perf_counter()
    grades = pool.grade(requests)
    seconds = time.perf_counter() - started
    return {
        "graded": len(grades),
        "right": grades.count(1.0),
        "ungraded": grades.count(None),
        "seconds": round(seconds, 2),
        "per_minute": round(60 * len(grades) / seconds),
    }


def main(
    answers: Annotated[int, typer.Option(help="mathematics and multiple choice")] = 4000,
    programs: Annotated[int, typer.Option(help="programs")] = 200,
    workers: Annotated[int, typer.Option(help="grading processes")] = 2,
    out: Annotated[Path, typer.Option(help="file for the result")] = ROOT / "bench/results/grading.json",
) -> None:
    """Measure, print and write the result."""
    with GraderPool(workers, timeout_s=60.0) as pool:
        result = {
            "benchmark": "grading",
            "workers": workers,
            "answers": measure(pool, answer_requests(answers), workers),
            "programs": {"tests_each": TESTS, **measure(pool, program_requests(programs), workers)},
            "machine": describe_machine(),
        }
    report(result, out)


if __name__ == "__main__":
    typer.run(main)
