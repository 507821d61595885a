"""Log lines for machines and for people."""

from __future__ import annotations

import fcntl
import json
import logging
import subprocess
import sys
import termios
import threading
from typing import IO

import pytest
from clocks import wait_until

from xbai.errors import UserError
from xbai.logs import JsonFormatter, TextFormatter, configure_logging


def record(message: str, *args: object, fields: dict | None = None) -> logging.LogRecord:
    made = logging.LogRecord("xbai.test", logging.INFO, __file__, 1, message, args, None)
    if fields is not None:
        made.fields = fields
    return made


def test_fields_are_keys_of_the_json_and_words_of_the_text() -> None:
    done = record("request", fields={"request_id": "a\nb", "status": 200})
    line = JsonFormatter().format(done)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["level"], entry["request_id"], entry["status"]) == ("request", "INFO", "a\nb", 200)
    assert TextFormatter().format(record("request", fields={"status": 200})).endswith("xbai.test: request status=200")
    assert TextFormatter().format(record("%d of %d", 1, 2)).endswith("xbai.test: 1 of 2")


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        failed = record("failed")
        failed.exc_info = sys.exc_info()
    line = JsonFormatter().format(failed)
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: why")


LOGGER_WITHOUT_READER = """
import logging, sys, time
from xbai.logs import configure_logging
configure_logging("json")
started = time.monotonic()
for number in range(2000):
    logging.info("line %d %s", number, "x" * (10_000 if number % 100 == 0 else 100))
print(time.monotonic() - started, flush=True)
sys.stdin.readline()
logging.info("the end")
"""


def unread(pipe: IO) -> int:
    """Bytes that wait in it."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_stderr_that_nobody_reads_stops_nobody() -> None:
    command = [sys.executable, "-c", LOGGER_WITHOUT_READER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as logging_process:
        assert float(logging_process.stdout.readline()) < 60
        said, shown = [], logging_process.stderr
        reader = threading.Thread(target=lambda: said.extend(shown))
        reader.start()
        wait_until(lambda: not unread(shown), "the pipe is empty")
        logging_process.stdin.write("\n")
        logging_process.stdin.close()
        reader.join(60)
    *first, notice, last = said
    numbers = [int(json.loads(line)["message"].split()[1]) for line in first if line.endswith("}\n")]
    assert numbers == list(range(len(numbers))) and len(numbers) > 100
    assert json.loads(last)["message"] == "the end"
    assert json.loads(notice)["message"] == f"{2000 - len(numbers)} lines of the log were dropped: nobody read stderr"


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match="--log_format 'xml': use json or text"):
        configure_logging("xml")


def test_vllms_level_is_its_own_in_either_case(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "0")
    monkeypatch.setattr(logging.getLogger("vllm"), "level", logging.WARNING)
    for level in ("debug", "DEBUG"):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", level)
        configure_logging("text")
        assert logging.getLogger("vllm").level == logging.DEBUG
