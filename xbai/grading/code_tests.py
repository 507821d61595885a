"""The tests of a programming problem, and the forms in which data sets hold them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import pickle
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

MAX_TESTS_BYTES = 2**30


@dataclass(frozen=True)
class Case:
    """One test."""

    input: str
    """Standard input; of a function, one argument a line as JSON."""
    output: str
    """What is to be printed; of a function, what it returns as JSON."""


@dataclass(frozen=True)
class CodeTests:
    """All tests of a problem, of a program that reads and prints or (with its name) of a function."""

    function: str | None
    cases: tuple[Case, ...]

    def to_json(self) -> str:
        """In the form that `read_code_tests` takes."""
        return json.dumps({"function": self.function, "tests": list(map(asdict, self.cases))}, ensure_ascii=False)


def read_code_tests(text: str) -> CodeTests:
    """Read `{"tests": [{"input", "output"}, ...]}` with `function` where one is called.

    More tests may be packed in `private_test_cases`, as LiveCodeBench does; or the whole is in a file of its own,
    gzipped JSON, named by `{"file": path}`, with the `sha256` of the JSON where it is to be checked.

    Raises:
        ValueError: the text is anything else.
        OSError: there is no such file.
    """
    tests = _object(text)
    if "file" in tests:
        tests = _object(_read_file(Path(tests["file"]), tests.get("sha256")))
    cases = [*tests.get("tests", []), *unpack_cases(tests.get("private_test_cases") or "[]")]
    if not cases:
        raise ValueError("there are no tests")
    return CodeTests(tests.get("function") or None, tuple(map(_case, cases)))


def unpack_cases(text: str) -> list[dict[str, Any]]:
    """Test cases out of JSON, or out of LiveCodeBench's base64 of zlib of a pickled text of JSON.

    Raises:
        ValueError: it is neither; a pickle of anything but plain values is not loaded.
    """
    try:
        cases = json.loads(text)
    except json.JSONDecodeError:
        cases = json.loads(_PlainUnpickler(io.BytesIO(_inflate(base64.b64decode(text)))).load_text())
    if not isinstance(cases, list):
        raise ValueError("test cases must be a list")
    return cases


def _read_file(path: Path, digest: str | None) -> str:
    with gzip.open(path) as stream:
        content = stream.read(MAX_TESTS_BYTES)
    if digest not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(f"{path} is not the file that was prepared")
    return content.decode()


def _inflate(data: bytes) -> bytes:
    decompressor = zlib.decompressobj()
    try:
        inflated = decompressor.decompress(data, MAX_TESTS_BYTES)
    except zlib.error as error:
        raise ValueError(f"packed test cases: {error}") from error
    if not decompressor.eof:
        raise ValueError(f"packed test cases are cut off, or longer than {MAX_TESTS_BYTES} bytes")
    return inflated


class _PlainUnpickler(pickle.Unpickler):
    """Loads strings and nothing that has to be imported, so that no pickle can run code."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"packed test cases hold a {module}.{name}, not a text")

    def load_text(self) -> str:
        try:
            text = self.load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"packed test cases: {error}") from error
        if not isinstance(text, str):
            raise ValueError(f"packed test cases hold a {type(text).__name__}, not a text")
        return text


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("tests must be a JSON object")
    return value


def _case(case: Any) -> Case:
    if not (isinstance(case, dict) and isinstance(case.get("input"), str) and isinstance(case.get("output"), str)):
        raise ValueError("every test needs the texts 'input' and 'output'")
    return Case(case["input"], case["output"])
