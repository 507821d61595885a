"""Programs as answers: which one counts, when outputs are the same, right and wrong programs against their tests."""

import ast
import itertools
import json
import sys
from pathlib import Path

import pytest
from clocks import cpu_seconds

from xbai.grading import GradeRequest, GraderPool, code, grade, pool
from xbai.grading.code import grade_code, same_output, same_result
from xbai.grading.program import find_program
from xbai.sandbox.job import Limits

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "cases/code.jsonl").read_text(encoding="utf-8").splitlines()
]

SUM = {"tests": [{"input": "3\n1 2 3\n", "output": "6\n"}, {"input": "1\n-5\n", "output": "-5\n"}]}
HALF = {"tests": [{"input": "3", "output": "1.5"}, {"input": "4", "output": "2"}]}
GRID = {"tests": [{"input": "2", "output": "#.\n.#\n"}]}
TWO_SUM = {
    "function": "twoSum",
    "tests": [{"input": "[2, 7, 11]\n9", "output": "[0, 1]"}, {"input": "[3, 3]\n6", "output": "[0, 1]"}],
}
JOIN = {"function": "join", "tests": [{"input": '["a", "b"]\n"-"', "output": '"a-b"'}]}
TREE = {"function": "depth", "tests": [{"input": "[[[]]]", "output": "3"}, {"input": "[]", "output": "1"}]}

THREADED = """
import threading
def main():
    input()
    print(sum(map(int, input().split())))
threading.Thread(target=main).start()
"""
EQUAL_TO_ALL = """
class Equal:
    def __eq__(self, other): return True
class Solution:
    def depth(self, t): return Equal()
"""

RIGHT = [
    (SUM, "input()\nprint(sum(map(int, input().split())))"),
    (SUM, "import sys\nn, *a = map(int, sys.stdin.read().split())\nprint(sum(a))"),
    (SUM, "def main():\n    input(); print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()"),
    (SUM, "input()\nprint('', sum(map(int, input().split())), '')\nprint()"),
    (SUM, "input()\nprint(float(sum(map(int, input().split()))))"),
    (SUM, "input()\nprint(sum(map(int, input().split())))\nexit(0)"),
    (SUM, THREADED),
    (SUM, "import sys\ninput = sys.stdin.readline\ninput()\nsys.stdout.write(str(sum(map(int, input().split()))))"),
    (SUM, "import io, os\nb = io.BytesIO(os.read(0, 99))\nb.readline()\nprint(sum(map(int, b.readline().split())))"),
    (SUM, "import sys\nprint('debug', file=sys.stderr)\ninput()\nprint(sum(map(int, input().split())))"),
    (SUM, "input()\nprint(reduce(add, map(int, input().split())))\n".replace("add", "lambda a, b: a + b")),
    (HALF, "print(int(input()) / 2)"),
    (HALF, "print(f'{int(input()) / 2:.3f}')"),
    (GRID, "n = int(input())\nfor i in range(n): print(''.join('#' if i == j else '.' for j in range(n)))"),
    (GRID, "print('#. ')\nprint('.#')"),
    (TWO_SUM, "class Solution:\n    def twoSum(self, a: List[int], t: int) -> List[int]:\n        return [0, 1]"),
    (TWO_SUM, "class Solution:\n    def twoSum(self, a, t):\n        print('thinking'); return (0, 1)"),
    (TWO_SUM, "def twoSum(a, t): return next([i, j] for i, j in combinations(range(len(a)), 2) if a[i] + a[j] == t)"),
    (JOIN, "class Solution:\n    def join(self, words, by): return by.join(words)"),
    (TREE, "class Solution:\n    def depth(self, t): return 1 + max(map(self.depth, t), default=0)"),
]  # fmt: skip

WRONG = [
    (SUM, "input()\nprint(max(map(int, input().split())))"),
    (SUM, "print(6)"),
    (SUM, "print(sum(map(int, input().split())))"),
    (SUM, "input()\nprint('Sum:', sum(map(int, input().split())))"),
    (SUM, "input()\nprint(sum(map(int, input().split())) + 1e-9)"),
    (SUM, "input()\nprint(sum(map(int, input().split())))\nraise ValueError"),
    (SUM, "input()\nprint(sum(map(int, input().split())))\nprint(0)"),
    (SUM, "input()\nreturn sum(map(int, input().split()))"),
    (SUM, "for line in"),
    (SUM, ""),
    (SUM, "while True: pass"),
    (SUM, "import os\nwhile True: os.fork()"),
    (SUM, "x = bytearray(8 * 2**30)"),
    (SUM, "import sys\nsys.stdout.buffer.write(b'\\xff6')"),
    (HALF, "print(int(input()) // 2)"),
    (GRID, "print('#.', '.#')"),
    (GRID, "print('#.')"),
    (GRID, "print('.#')\nprint('#.')"),
    (TWO_SUM, "class Solution:\n    def twoSum(self, a, t): return [1, 0]"),
    (TWO_SUM, "class Solution:\n    def twoSum(self, a, t): print([0, 1])"),
    (TWO_SUM, "class Solution:\n    def two_sum(self, a, t): return [0, 1]"),
    (TWO_SUM, "class Solution:\n    def twoSum(self, a): return [0, 1]"),
    (TWO_SUM, "print([0, 1])"),
    (JOIN, "class Solution:\n    def join(self, words, by): return words"),
    (JOIN, "class Solution:\n    def join(self, words, by): return float('nan')"),
    (TREE, EQUAL_TO_ALL),
]  # fmt: skip


def fenced(program):
    return f"<think>```python\nnot this one\n```</think>So:\n\n```python\n{program}\n```\n"


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(code, "LIMITS", Limits(cpu_s=2))


@pytest.mark.parametrize("tests,program", RIGHT)
def test_right(tests, program):
    assert grade(GradeRequest("livecodebench", fenced(program), json.dumps(tests))) == 1.0


@pytest.mark.parametrize("tests,program", WRONG)
def test_wrong(tests, program):
    assert grade(GradeRequest("livecodebench", fenced(program), json.dumps(tests))) == 0.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}: {case['response'][:40]!r}")
def test_what_models_write(case):
    assert grade_code(case["response"], json.dumps(case["tests"])) is case["right"]


@pytest.mark.parametrize(
    "response,program",
    [
        ("```python\nprint(1)\n```", "print(1)"),
        ("```\nimport sys\nprint(1)\n```", "import sys\nprint(1)"),
        ("```py\nprint(1)\n```\nor better\n```python\nprint(2)\n```\nDone.", "print(2)"),
        ("```python\nprint(1)\n```\nor better\n```python\nprint(2)", None),
        ("```python\nprint(1)", None),
        ("1. So:\n   ```python\n   if a:\n       print(a)\n   ```", "if a:\n    print(a)"),
        ("<think>```python\nprint(1)\n```</think>print(1)", None),
        ("<think>```python\nprint(1)\n```</think>```python\nprint(2)\n```", "print(2)"),
        ("print(1)", None),
        ("`print(1)`", None),
        ("```python\nprint('```')\n```", "print('```')"),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\r"),
        ("", None),
    ],
)
def test_which_block_counts(response, program):
    assert find_program(response) == program


PROGRAMS = (
    "print(3)",
    "import sys\n\n\ndef main():\n    print(sys.stdin.read())\n\n\nif __name__ == '__main__':\n    main()",
    "n = int(input())\n# ``` in a comment\nfor i in range(n):\n    print(i, end=' ')",
    'def f():\n    """Of ```python\n```\n    x\n```\n    """\n    return "```"\n\n\nprint(f())',
    "s = '```' + \"~~~\"\nprint(s, f'{s}~~~```')",
    "print('it\\'s', \"```\")  # it's",
    "text = r'''\n~~~\n```\n'''\nprint(text)",
)
FENCES = (
    ("```python\n", "\n```"),
    ("```\n", "\n```"),
    ("Answer: ```py\n", "\n``` done."),
    ("`````python3\n", "\n`````"),
    ("~~~python\n", "\n~~~~"),
    ("~~~~ Python\n", "\n~~~~ <end>"),
    ("```python\n", "```"),
    ("```{.python .numberLines}\n", "\n```<|im_end|>"),
)
BEFORE = (
    "",
    "First:\n```python\nprint('draft')\n```\n",
    "Use ```f(x)```, not `g`.\n",
    "```\n1 2\n```\n",
    "~~~text\nit's\n~~~\n",
)
AFTER = (
    "",
    "\n",
    "\n```",
    "\n```\nIt works.",
    "\nOutput:\n```\n3\n```",
    "\n```text\nit's ``` so\n```",
    "\n~~~bash\npython a.py\n~~~\n",
    '\n```json\n{"a": [1, 2]}\n```\nThat\'s it.',
)


def test_a_program_is_found_whole_whatever_stands_around_it():
    for program, (opening, closing), before, after in itertools.product(PROGRAMS, FENCES, BEFORE, AFTER):
        response = f"{before}{opening}{program}{closing}{after}"
        found = find_program(response)
        # A fence that follows a comment may be taken for a part of it.
        assert found is not None, response
        assert ast.dump(ast.parse(found)) == ast.dump(ast.parse(program)), response


@pytest.mark.parametrize(
    "text",
    [
        "```\n" * 50_000,
        "```\n'''\n" * 20_000,
        "```python\n'''" + "\n```" * 50_000,
        "```python print(1) " * 20_000,
        "x ``` y\n" * 50_000,
        "> " * 100_000 + "```",
        "\n".join("`" * (3 + length) for length in range(600)),
        "```python\n" + "(" * 200_000 + "\n```",
        "```python\n" + "-" * 200_000 + "1\n```",
        "```python\n\0\n```",
        "```python\nprint('\ud800')\n```",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_finding_a_program_takes_no_long_time(text):
    assert cpu_seconds(find_program, text) < 5


@pytest.mark.parametrize(
    "program,stdin,output,right",
    [
        ("print(10**5000)", "", "1" + "0" * 5000, True),
        ("print(10**5000 + 1)", "", "1" + "0" * 5000, False),
        ("n = int(input())\nprint(n % 10)", "1" * 5999 + "7", "7", True),
        ("print(int(input()) * 10**40_000)", "7", "7" + "0" * 40_000, True),
        ("print(10**49_999)", "", "1" + "0" * 49_999, True),
        # As with LiveCodeBench, whose limit is the same.
        ("print(10**50_000)", "", "1" + "0" * 50_000, False),
        ("print(" + "9" * 6000 + " % 7)", "", str((10**6000 - 1) % 7), True),
    ],
    ids=str,
)
def test_long_integers_of_programs(program, stdin, output, right):
    tests = {"tests": [{"input": stdin, "output": output}]}
    assert grade_code(f"```python\n{program}\n```", json.dumps(tests)) is right


@pytest.mark.parametrize("step,right", [(1, True), (2, False)])
def test_long_integers_of_functions(step, right):
    digits = "12345678" * 500
    tests = {"function": "f", "tests": [{"input": f"{'1' * 5000}\n{digits}", "output": f"[{digits[:-1]}9]"}]}
    limit = sys.get_int_max_str_digits()
    program = f"```python\ndef f(a, b):\n    return [b + {step} + a - a]\n```"
    assert grade_code(program, json.dumps(tests)) is right
    assert sys.get_int_max_str_digits() == limit, "of the grading alone"


def test_long_outputs_are_compared_in_no_long_time():
    def compare() -> None:
        assert not same_output("9" * 2**24, "9" * 2**24 + "1")
        assert same_output("9" * 2**22 + ".0", "9" * 2**22)
        assert not same_output("1 " * 2**20, "1 " * (2**20 - 1) + "2")
        assert not same_result("9" * 2**22, "1")

    assert cpu_seconds(compare) < 10


@pytest.mark.parametrize(
    "output,expected,same",
    [
        ("1 2\n", "1 2", True),
        ("  1 2  \n\n", "1 2\n", True),
        ("1.0 2", "1 2.00", True),
        ("1e3", "1000", True),
        ("1  2", "1 2", True),
        ("Yes", "Yes", True),
        ("a  b", "a b", False),
        ("YES", "Yes", False),
        ("1 2", "2 1", False),
        ("1\n2", "1 2", False),
        ("1\n\n2", "1\n2", False),
        ("", "1", False),
        ("", "", True),
        ("0.333", "0.3333", False),
        ("nan", "nan", True),
        ("1 nan", "1 NaN", False),
        ("1" * 30, "1" * 29 + "2", False),
    ],
)
def test_same_output(output, expected, same):
    assert same_output(output, expected) is same


@pytest.mark.parametrize(
    "result,expected,same",
    [
        ("[1, 2]", "[1,2]", True),
        ("1.0", "1", True),
        ("true", "false", False),
        ("", "1", False),
        ("[" * 10**5, "1", False),
    ],
)
def test_same_result(result, expected, same):
    assert same_result(result, expected) is same


def test_a_pool_grades_code_beside_other_answers_and_says_once_how_it_is_contained(caplog, monkeypatch):
    pool._warn_once.cache_clear()
    monkeypatch.setenv("PATH", "")
    requests = [
        GradeRequest("livecodebench", fenced("input()\nprint(sum(map(int, input().split())))"), json.dumps(SUM)),
        GradeRequest("livecodebench", fenced("print(6)"), json.dumps(SUM)),
        GradeRequest("aime24", "\\boxed{016}", 16),
        GradeRequest("livecodebench", fenced("print(6)"), "{}"),
    ]
    with GraderPool(1, timeout_s=20.0) as graders:
        assert graders.grade(requests) == [1.0, 0.0, 1.0, None]
        assert graders.failures == {"error": 1}
    assert [message for message in caplog.messages if "bubblewrap is not installed" in message] == [
        message for message in caplog.messages if "fewer walls" in message
    ]
    assert sum("fewer walls" in message for message in caplog.messages) == 1


def test_the_pools_limit_leaves_time_for_every_test():
    slow = {"tests": [{"input": "", "output": ""}] * 2}
    request = GradeRequest("code", fenced("import time; time.sleep(0.5)"), json.dumps(slow))
    with GraderPool(1, timeout_s=0.2) as graders:
        assert graders.grade([request]) == [1.0]
