"""Which model the policy service loads, as its flags say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from typer.testing import CliRunner

from xbai.cli import app as cli
from xbai.engine import Engine
from xbai.engine.tensor_parallel import check_tensor_parallel_size, largest_tensor_parallel_size
from xbai.errors import UserError
from xbai.serve import policy, server
from xbai.serve.options import PolicyOptions


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """`serve(folder, **flags) -> the engine that would answer`."""
    loaded: list[Engine] = []
    monkeypatch.setattr(policy, "serve", lambda app, listener: loaded.append(app.state.service.thread._load()))

    def serve_policy(folder: Path, **flags: Any) -> Engine:
        policy.run_policy_service(PolicyOptions(model_path=str(folder), port=0, engine="hf", **flags))
        return loaded[-1]

    return serve_policy


@pytest.mark.parametrize(("with_scores", "scores"), [(None, True), (True, True), (False, False)])
def test_scores_are_loaded_unless_told_not_to(serve, tiny_model_dir: Path, with_scores: bool | None, scores: bool):
    assert (serve(tiny_model_dir, with_scores=with_scores).step_rule is not None) == scores


def test_flags_that_cannot_act_are_refused(serve, make_tiny_model) -> None:
    folder = make_tiny_model()
    (folder / "score_module.pt").unlink()
    assert serve(folder, with_scores=None).step_rule is None
    with pytest.raises(UserError, match=r"--with_scores: .* has no score_module\.pt"):
        serve(folder, with_scores=True)
    for flag, value in (("tensor_parallel_size", 2), ("gpu_memory_utilization", 0.5)):
        with pytest.raises(UserError, match=f"{flag}: the hf engine has no such option"):
            serve(folder, with_scores=None, **{flag: value})


@pytest.mark.parametrize(
    ("variable", "gpus", "flag", "size"),
    # The tiny model has 2 heads.
    [(None, 8, None, 1), ("0,1", 2, None, 2), ("", 0, None, 1), ("0,1", 2, 1, 1), ("0,1,2", 3, None, 2)],
)
def test_the_visible_gpus_share_the_model(
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str | None,
    gpus: int,
    flag: int | None,
    size: int,
) -> None:
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(policy, "find_spec", lambda name: True)
    given: dict[str, Any] = {}
    monkeypatch.setattr(policy, "load_engine", lambda *args, **options: given.update(options))
    monkeypatch.setattr(policy, "serve", lambda app, listener: app.state.service.thread._load())
    policy.run_policy_service(PolicyOptions(model_path=str(tiny_model_dir), port=0, tensor_parallel_size=flag))
    assert given["tensor_parallel_size"] == size
    said = [record.getMessage() for record in caplog.records if "GPUs in CUDA_VISIBLE_DEVICES" in record.getMessage()]
    assert [message[:11] for message in said] == (["2 of the 3 "] if gpus == 3 else [])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "mlp", "sizes"),
    [
        # Qwen2.5 of 0.5B, 1.5B, 7B and 32B.
        (14, 2, 4864, [1, 2, 2, 2, 2, 2, 2, 2]),
        (12, 2, 8960, [1, 2, 2, 4, 4, 4, 4, 4]),
        (28, 4, 18944, [1, 2, 2, 4, 4, 4, 4, 4]),
        (40, 8, 27648, [1, 2, 2, 4, 4, 4, 4, 8]),
        (12, 3, 96, [1, 1, 3, 3, 3, 6, 6, 6]),
        (None, None, None, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_as_many_gpus_as_heads_divide_among(
    heads: int | None, kv_heads: int | None, mlp: int | None, sizes: list[int]
) -> None:
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp}
    found = [largest_tensor_parallel_size(most, config) for most in range(1, 9)]
    assert found == sizes
    for size in {*found}:
        check_tensor_parallel_size(size, config, "")


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "mlp", "fits"),
    [
        *((2, 4, 2, 64, True), (4, 4, 2, 64, True), (2, 4, None, None, True)),
        *((3, 4, 2, 64, False), (4, 14, 2, 64, False), (6, 12, 4, 96, False), (2, 4, 2, 65, False)),
    ],
)
def test_gpus_that_cannot_share_the_model_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    heads: int,
    kv_heads: int | None,
    mlp: int | None,
    fits: bool,
) -> None:
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": mlp}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(policy, "find_spec", lambda name: True)
    monkeypatch.setattr(policy, "serve", lambda app, listener: None)

    def start() -> None:
        options = PolicyOptions(model_path=str(tmp_path), port=0, engine="vllm", tensor_parallel_size=size)
        policy.run_policy_service(options)

    if fits:
        start()
    else:
        named = f"--tensor_parallel_size {size} .*heads={heads} and .*size={mlp}, .*heads={kv_heads} "
        with pytest.raises(UserError, match=named):
            start()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="there is no IPv6 here")
@pytest.mark.parametrize(
    ("ip", "reached", "refused"),
    [
        ("::", ("127.0.0.1", "[::1]"), ()),
        ("0.0.0.0", ("127.0.0.1",), ("[::1]",)),
        ("::1", ("[::1]",), ("127.0.0.1",)),
        ("localhost", ("127.0.0.1",), ("[::1]",)),
    ],
)
def test_an_address_is_listened_on(
    serve_app: Callable[..., str], ip: str, reached: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    app = FastAPI()
    app.get("/health")(lambda: "alive")
    port = serve_app(app, server.listen(ip, 0)).rpartition(":")[2]
    for host in reached:
        assert httpx.get(f"http://{host}:{port}/health").json() == "alive"
    for host in refused:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{host}:{port}/health")


@pytest.mark.parametrize(
    ("ip", "problem"),
    [
        ("", r"no address; 127\.0\.0\.1 is this machine alone"),
        (" ", "cannot listen there"),
        ("no such name", "cannot listen there"),
        ("[::1]", "cannot listen there"),
        ("a" * 100, "cannot listen there"),
        ("ü" * 100, "cannot listen there"),
        ("192.0.2.1", r"cannot listen there \(Cannot assign requested address; --ip is an address of this machine"),
        ("2001:db8::1", "cannot listen there .*; --ip is an address of this machine"),
    ],
)
def test_what_is_no_address_here_is_refused_in_a_line_before_a_model_loads(
    serve, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, ip: str, problem: str
) -> None:
    monkeypatch.setattr(policy, "EngineThread", lambda load: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=problem) as caught:
        policy.run_policy_service(PolicyOptions(model_path=str(tiny_model_dir), ip=ip, port=0, engine="hf"))
    assert str(caught.value).startswith(f"--ip {ip or repr(ip)}")
    assert "Unknown error" not in str(caught.value)


def test_a_port_that_is_taken_is_said() -> None:
    with (
        server.listen("::", 0) as listener,
        pytest.raises(UserError, match=r"\(Address already in use; choose another"),
    ):
        server.listen("127.0.0.1", listener.getsockname()[1])


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    result = CliRunner().invoke(cli, ["serve-score", "--model_path", "nowhere", "--port", port])
    assert result.exit_code == 2
    assert "Invalid value for '--port'" in result.output


def test_threads_give_way_unless_told_how_to_wait() -> None:
    script = (
        "import os, sys, xbai.cli; assert 'torch' not in sys.modules; xbai.cli.share_cores();"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    without = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for environment, expected in (
        (without, "2000"),
        (without | {"GOMP_SPINCOUNT": "7"}, "7"),
        (without | {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ):
        found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert found.stdout.split() == [expected], found.stderr
