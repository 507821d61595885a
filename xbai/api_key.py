"""The secret that services ask for and clients send."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from xbai.errors import UserError

API_KEY_VARIABLE = "XBAI_API_KEY"


@dataclass(frozen=True)
class ApiKeyOptions:
    """Where the secret of the services stands, if they have one."""

    api_key: Annotated[str | None, typer.Option(envvar=API_KEY_VARIABLE)] = field(default=None, repr=False)
    """Secret of the services; other users of the machine can read a command line, so prefer the variable."""
    api_key_file: Path | None = None
    """A file that holds the key."""

    def read(self) -> str | None:
        """The key as given, or what the file holds without the white space around it; None where neither is given.

        Raises:
            UserError: both are given, the file cannot be read, or the key is not one that fits an HTTP header.
        """
        key, file = self.api_key, self.api_key_file
        if file is not None:
            if key is not None:
                raise UserError(f"--api_key_file: the key is given by --api_key or {API_KEY_VARIABLE} too; keep one")
            try:
                key = file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--api_key_file {file}: cannot be read ({error})") from None
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            source = f"--api_key or {API_KEY_VARIABLE}" if file is None else f"--api_key_file {file}"
            raise UserError(f"{source}: an API key is printable ASCII without spaces, on one line, and not empty")
        return key


def authorization(key: str | None) -> dict[str, str]:
    """The request header that carries the key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
