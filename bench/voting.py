"""Seconds that it takes to find out which answers of a question vote together.

    python bench/voting.py [--questions 200] [--samples 32] [--workers 2] [--out FILE]

The questions are of five kinds in turn: whole numbers, fractions, radicals, formulas and tuples. Most have up to five
different answers, every eleventh has up to twenty, each written in several ways, of which some are equal to the grader
only. The clock includes the start of the processes. The last line is one JSON object; `grouped_as_meant` counts the
questions whose responses vote together exactly where they give the same value.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated

import typer
from machine import ROOT, describe_machine, report

from xbai.grading import AnswerGroups

SEED = 0
FEW, MANY = 5, 20
FAVOURITE = 0.5
"""Share of the samples that give a question's most frequent answer."""
REASONING = "Let me think about this step by step.\n\n" * 100


def spellings(kind: int, a: int, b: int) -> list[str]:
    """Ways of writing one value, which differs for each (a, b)."""
    return [
        [f"{a}", f"x={a}", f"{a}.0", rf"{a}\text{{ cm}}", rf"\frac{{{3 * a}}}{{3}}"],
        [rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{2 * a}}}{{{2 * b}}}", f"{a}/{b}", rf"p=\frac{{{a}}}{{{b}}}"],
        [rf"{b}\sqrt{{{a}}}", rf"\sqrt{{{b * b * a}}}", rf"\frac{{{b * a}}}{{\sqrt{{{a}}}}}"],
        [f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"{a * b}+{a + b}x+x^2", f"f(x)=(x+{b})(x+{a})"],
        [f"({a}, {b})", rf"\left({a},{b}\right)", f"({a}.0,{b})", f"{a}, {b}"],
    ][kind]


def question(rng: random.Random, index: int, samples: int) -> tuple[list[str], list[int]]:
    """The responses to a question, and which value each gives."""
    kind, different = index % 5, MANY if index % 11 == 10 else FEW
    base = rng.randint(2, 400)
    # Primes keep radicals and fractions of different values apart.
    values = [(base + step, rng.choice((7, 11, 13, 17))) for step in range(different)]
    given = [0 if rng.random() < FAVOURITE else rng.randrange(1, different) for _ in range(samples)]
    responses = []
    for value in given:
        answer = rng.choice(spellings(kind, *values[value]))
        responses.append(f"<think>{REASONING}</think>So it is $\\boxed{{{answer}}}$.")
    return responses, given


def main(
    questions: int = 200,
    samples: int = 32,
    workers: Annotated[int, typer.Option(help="processes")] = 2,
    out: Annotated[Path, typer.Option(help="file for the result")] = ROOT / "bench/results/voting.json",
) -> None:
    """Measure, print and write the result."""
    rng = random.Random(SEED)
    drawn = [question(rng, index, samples) for index in range(questions)]
    started = time.perf_counter()
    with AnswerGroups("math500", workers) as groups:
        votes = groups.of([responses for responses, _ in drawn])
    seconds = time.perf_counter() - started
    result = {
        "benchmark": "voting",
        "questions": questions,
        "samples": samples,
        "workers": workers,
        "seconds": round(seconds, 2),
        "values": sum(len(set(given)) for _, given in drawn),
        "groups": sum(len(set(found)) for found in votes),
        "grouped_as_meant": sum(
            len(set(zip(found, given))) == len(set(found)) == len(set(given)) for found, (_, given) in zip(votes, drawn)
        ),
        "machine": describe_machine(),
    }
    report(result, out)


if __name__ == "__main__":
    typer.run(main)
