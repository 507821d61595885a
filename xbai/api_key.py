"""The secret that services ask for and clients send."""

from __future__ import annotations

from pathlib import Path

from xbai.errors import UserError

API_KEY_VARIABLE = "XBAI_API_KEY"


def read_api_key(key: str | None, file: Path | None) -> str | None:
    """The key as given, or what `file` holds without the white space around it; None where neither is given.

    Raises:
        UserError: both are given, the file cannot be read, or the key is not one that fits an HTTP header.
    """
    if file is not None:
        if key is not None:
            raise UserError(f"--api_key_file: the key is given by --api_key or {API_KEY_VARIABLE} too; keep one")
        try:
            key = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api_key_file {file}: cannot be read ({error})") from None
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        source = f"--api_key or {API_KEY_VARIABLE}" if file is None else f"--api_key_file {file}"
        raise UserError(f"{source}: an API key is printable ASCII without spaces, on one line, and not empty")
    return key


def authorization(key: str | None) -> dict[str, str]:
    """The request header that carries the key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
