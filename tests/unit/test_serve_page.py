"""The page's files over HTTP: who gets them, with which headers, and that nothing else became public."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine

from xbai.serve.engine_thread import EngineThread
from xbai.serve.limits import Limits
from xbai.serve.options import OpenAIOptions
from xbai.serve.page import FOLDER, PAGE_ROUTES
from xbai.serve.policy import create_policy_app

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture
def start(serve_app: Callable[..., str], tiny_model_dir: Path) -> Callable[..., str]:
    def start(**options: Any) -> str:
        thread = EngineThread(lambda: ScriptedEngine(tiny_model_dir, lambda prompt, index: ("", 0.5)))
        limits = replace(Limits(), api_key="secret")
        return serve_app(create_policy_app(thread, "models/wise", limits, OpenAIOptions(**options)))

    return start


def test_the_page_needs_no_key_and_all_else_does(start: Callable[..., str]) -> None:
    url = start()
    assert {"/", "/web/app.js", "/web/vendor/preact.js"} <= PAGE_ROUTES
    for route in PAGE_ROUTES:
        assert httpx.get(url + route).status_code == 200, route
    for route in (
        "/v1/models",
        "/ready",
        "/metrics",
        "/docs",
        "/web",
        "/web/",
        "/web/nothing.js",
        "/web/%2e%2e/page.py",
    ):
        assert httpx.get(url + route).status_code == 401, route
    for outside in ("/web/nothing.js", "/web/%2e%2e/page.py", "/web/..%2fpage.py"):
        assert httpx.get(url + outside, headers=KEY).status_code == 404, outside
    assert httpx.post(f"{url}/").status_code == 405


def test_a_browser_is_told_to_obey_nothing_else(start: Callable[..., str]) -> None:
    url = start()
    page = httpx.get(f"{url}/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html") and "<script>" not in page.text
    for route, kind in (("/web/app.js", "javascript"), ("/web/style.css", "text/css"), ("/web/icon.svg", "image/svg")):
        file = httpx.get(url + route)
        assert kind in file.headers["content-type"] and file.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(url + route, headers={"If-None-Match": file.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_no_page_on_request(start: Callable[..., str]) -> None:
    url = start(page=False)
    assert httpx.get(f"{url}/").status_code == 401 and httpx.get(f"{url}/", headers=KEY).status_code == 404


def test_the_page_is_whole_without_a_network() -> None:
    """No file of its own names another host, and each library has its licence beside it."""
    for path in FOLDER.glob("*"):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert "://" not in text.replace("http://www.w3.org/2000/svg", ""), path.name
    libraries = [line.partition("@")[0] for line in (FOLDER / "vendor" / "VERSIONS").read_text("utf-8").splitlines()]
    assert len(libraries) == 5
    for name in libraries:
        assert (FOLDER / "vendor" / f"{name}.LICENSE").stat().st_size > 500
