"""Where the services' secret comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from xbai.api_key import ApiKeyOptions, authorization
from xbai.errors import UserError


def test_the_key_is_given_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n", encoding="utf-8")
    assert ApiKeyOptions(None, None).read() is None
    assert ApiKeyOptions("given", None).read() == "given"
    assert ApiKeyOptions(None, file).read() == "secret"
    assert authorization("secret") == {"Authorization": "Bearer secret"}
    assert authorization(None) == {}
    with pytest.raises(UserError, match="keep one"):
        ApiKeyOptions("given", file).read()


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", "schl\u00fcssel".encode(), b"\xff", b"a\nb"])
def test_a_key_that_no_header_can_carry_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"--api_key_file {file}: "):
        ApiKeyOptions(None, file).read()
    with pytest.raises(UserError, match="nowhere"):
        ApiKeyOptions(None, tmp_path / "nowhere").read()
