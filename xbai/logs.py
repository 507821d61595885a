"""Log lines as JSON for machines or as text for people. What a record gives as `extra={"fields": {...}}` is in both."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time

from xbai.errors import UserError

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class TextFormatter(logging.Formatter):
    """The message, then `name=value` for each field."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line without a traceback."""
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{name}={value}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, the fields, and `exception` after one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class StderrHandler(logging.Handler):
    """Writes to stderr what it takes at once: a pipe that nobody reads must not stop whoever logs.

    What it does not take is dropped; how many lines these were is said as soon as there is room again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dropped = 0
        self._cut = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line of a record, or count it."""
        try:
            if self._dropped:
                message = f"{self._dropped} lines of the log were dropped: nobody read stderr"
                notice = logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)
                if self._write(self.format(notice)):
                    self._dropped = 0
            if self._dropped or not self._write(self.format(record)):
                self._dropped += 1
        except Exception:
            self.handleError(record)

    def _write(self, line: str) -> bool:
        """Whether all of the line was taken."""
        if sys.__stderr__ is None:
            return False
        descriptor = sys.__stderr__.fileno()
        left = f"{chr(10) * self._cut}{line}\n".encode(errors="backslashreplace")
        room = select.poll()
        room.register(descriptor, select.POLLOUT)
        while left:
            # A pipe that is ready takes this much without waiting.
            if not room.poll(0):
                return False
            written = os.write(descriptor, left[: select.PIPE_BUF])
            left = left[written:]
            self._cut = bool(left)
        return True


FORMATTERS = {"json": JsonFormatter, "text": TextFormatter}


def configure_logging(log_format: str) -> None:
    """Log to stderr in this format.

    Raises:
        UserError: there is no such format.
    """
    if log_format not in FORMATTERS:
        raise UserError(f"--log_format {log_format!r}: use {' or '.join(FORMATTERS)}")
    handler = StderrHandler()
    handler.setFormatter(FORMATTERS[log_format]())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # vLLM, once imported, leaves its lines to this handler.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "WARNING").upper())
