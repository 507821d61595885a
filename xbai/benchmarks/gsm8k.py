"""GSM8K (Cobbe et al., arXiv 2110.14168): school word problems with integer answers."""

from xbai.benchmarks.base import MathBenchmark, Row

ANSWER_MARK = "####"


def final_answer(solution: str) -> str:
    """What follows `####`, where the published solutions give the answer; the whole text without it."""
    return solution.rpartition(ANSWER_MARK)[-1].strip()


class GSM8K(MathBenchmark):
    """Reads the published layout, whose `answer` is a worked solution, too."""

    name = data_source = "gsm8k"

    def answer_from_row(self, row: Row, place: str) -> str | int | float:
        """The final answer alone."""
        answer = super().answer_from_row(row, place)
        return final_answer(answer) if isinstance(answer, str) else answer
