"""The merger's command: what it writes, and what it says when it cannot."""

from __future__ import annotations

import base64
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny import adam
from torch.distributed._shard.sharded_tensor import Shard as ShardOfTensor
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.checkpoints.checksums import CHECKSUM_FILE
from verl.checkpoints.state import load_checkpoint, save_checkpoint
from verl.models.fsdp import create_mesh, shard_model
from verl.models.loading import build_joint_model
from verl.models.packing import padded_layout
from verl.optim.optimizers import JointOptimizer
from xbai.errors import UserError
from xbai.model_files import ModelFiles
from xbai.sprm import SPRMConfig, StepRule, load_score_head, load_sprm_config
from xbai.sprm.head import SCORE_MODULE_FILE

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module", params=[pytest.param(False, marks=pytest.mark.long), True], ids=["untied", "tied"])
def experiment(
    request, process_group, make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An experiment's folder with one checkpoint, and the model that is in it."""
    source, folder = make_tiny_model(tied=request.param), tmp_path_factory.mktemp("experiment")
    tokenizer = AutoTokenizer.from_pretrained(source)
    sprm_config = load_sprm_config(source, tokenizer)
    model = shard_model(build_joint_model(source, sprm_config=sprm_config), create_mesh())
    optimizer = JointOptimizer(model, adam(), adam())
    save_checkpoint(folder / "global_step_3" / "actor", model, optimizer, ModelFiles.read(source), sprm_config)
    (folder / "latest_checkpointed_iteration.txt").write_text("3", encoding="utf-8")
    return folder, source


@pytest.fixture(scope="module")
def merge() -> Callable:
    return runpy.run_path(str(SCRIPTS / "model_merger.py"))["merge"]


def run_shell(*arguments: object, cwd: Path = SCRIPTS, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(SCRIPTS / "model_merger.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.mark.slow
def test_the_latest_checkpoint_becomes_the_same_model(experiment: tuple[Path, Path], tmp_path: Path):
    folder, source = experiment
    merged = tmp_path / "merged"
    result = run_shell(LOCAL_DIR=str(folder), TARGET_DIR=str(merged))
    assert result.returncode == 0, result.stderr
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, merged))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = load_sprm_config(merged, AutoTokenizer.from_pretrained(merged))
    assert config == load_sprm_config(source, AutoTokenizer.from_pretrained(source))
    heads = [load_score_head(path, 64, config).state_dict() for path in (source, merged)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    result = run_shell("merge", "--backend", "fsdp", "--use_score", "--local_dir", folder, "--target_dir", merged)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {merged} exists already; remove it or choose another --target_dir"


def test_the_merged_model_gives_every_token_the_actors_probability(
    process_group: None, make_tiny_model: Callable[..., Path], merge: Callable, tmp_path: Path
):
    source = make_tiny_model(tied=False)
    actor = shard_model(build_joint_model(source), create_mesh()).eval()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.1)
    save_checkpoint(tmp_path / "actor", actor, JointOptimizer(actor, adam()), ModelFiles.read(source))
    merge(tmp_path / "actor", tmp_path / "merged")

    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, tmp_path / "merged"))
    vocabulary = torch.arange(after.config.vocab_size)
    ids = torch.cat([torch.tensor([[5, 9, 2, 7]]).expand(len(vocabulary), -1), vocabulary[:, None]], dim=1)
    with torch.no_grad():
        found = actor(padded_layout(one_token_responses(ids))).log_probs
        then, now = (model(ids[:1, :-1]).logits[0, -1].log_softmax(-1) for model in (before, after))
    torch.testing.assert_close(found, now, atol=1e-5, rtol=1e-5)
    assert (found - then).abs().max() > 0.01


def one_token_responses(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    ones = torch.ones_like(ids)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": ids, "attention_mask": ones, "position_ids": positions, "response_mask": ones[:, -1:]}


def checkpoint_of(source: Path, folder: Path, sprm_config: SPRMConfig | None = None) -> Path:
    """What one rank saves that holds the model of `source` in float32."""
    model = shard_model(build_joint_model(source, sprm_config=sprm_config), create_mesh())
    optimizer = JointOptimizer(model, adam(), adam() if sprm_config is not None else None)
    save_checkpoint(folder / "actor", model, optimizer, ModelFiles.read(source), sprm_config)
    return folder


def as_dtype(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy whose weights and configuration are of another dtype."""
    shutil.copytree(source, folder)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    return folder


def stored_in(folder: Path) -> tuple[set[torch.dtype], str, str]:
    """Dtypes of a model folder's weights, and what its configuration calls them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    return {tensor.dtype for tensor in weights.values()}, config["dtype"], config["torch_dtype"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_is_merged_in_the_dtype_that_it_was_trained_from(
    dtype: torch.dtype, process_group, make_tiny_model, merge: Callable, tmp_path: Path, caplog
):
    caplog.set_level("INFO")
    source, name = as_dtype(make_tiny_model(), tmp_path / "source", dtype), str(dtype).removeprefix("torch.")
    checkpoint = checkpoint_of(source, tmp_path / "step")
    merge(checkpoint, tmp_path / "out")
    assert stored_in(tmp_path / "out") == ({dtype}, name, name)
    assert f"written in {name} (trained in float32; --dtype writes another)" in caplog.text
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    merge(checkpoint, tmp_path / "other", dtype="float32")
    assert stored_in(tmp_path / "other") == ({torch.float32}, "float32", "float32")


def test_where_no_configuration_says_a_dtype_it_is_that_of_the_weights(
    process_group, make_tiny_model, merge: Callable, tmp_path: Path
):
    source = as_dtype(make_tiny_model(), tmp_path / "source", torch.bfloat16)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    merge(checkpoint_of(source, tmp_path / "step"), tmp_path / "out")
    assert stored_in(tmp_path / "out") == ({torch.bfloat16}, "bfloat16", "bfloat16")


def test_values_beyond_a_dtype_are_named(process_group, make_tiny_model, merge: Callable, tmp_path: Path):
    source = make_tiny_model()
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    state["model.norm.weight"][3] = 1e6
    (tmp_path / "actor").mkdir()
    torch.save(state, tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    with pytest.raises(UserError, match=r"model.norm.weight holds values that are not finite as torch.float16"):
        merge(tmp_path, tmp_path / "out", hf_model_path=source, dtype="float16")
    merge(tmp_path, tmp_path / "out", hf_model_path=source, dtype="bfloat16")


@pytest.fixture
def published(make_tiny_model, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in the layout of the published trainer: its head has no step rule beside it."""
    source, actor = make_tiny_model(), tmp_path / "global_step_80" / "actor"
    actor.mkdir(parents=True)
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    shutil.move(source / "score_module.pt", actor)
    (source / "sprm_config.json").unlink()
    shutil.copytree(source, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    return source, actor


def test_no_step_rule_is_made_up(published: tuple[Path, Path], merge: Callable, tmp_path: Path):
    merge(published[1], tmp_path / "out")
    assert (tmp_path / "out" / "score_module.pt").is_file() and not (tmp_path / "out" / "sprm_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for lang in ("en", "zh"):
        assert load_sprm_config(tmp_path / "out", tokenizer, lang).step_rule.lang == lang
        merge(published[1], tmp_path / lang, lang=lang)
        assert load_sprm_config(tmp_path / lang, tokenizer) == load_sprm_config(tmp_path / "out", tokenizer, lang)


def test_a_step_rule_that_travels_is_kept(process_group, make_tiny_model, merge: Callable, tmp_path: Path):
    source = make_tiny_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    zh = SPRMConfig(StepRule.from_tokenizer(tokenizer, "zh"), dropout=0.25)
    checkpoint = checkpoint_of(source, tmp_path / "step", zh)
    # Also where the folder that is named for the configuration knows another.
    for name, options in {"out": {}, "lang": {"lang": "zh"}, "named": {"hf_model_path": source}}.items():
        merge(checkpoint, tmp_path / name, **options)
        assert load_sprm_config(tmp_path / name, tokenizer) == zh
    with pytest.raises(UserError, match=r"the head was trained with lang=zh, not lang=en"):
        merge(checkpoint, tmp_path / "other", lang="en")


def test_a_checkpoint_without_a_head_is_not_taken_for_one(
    process_group, make_tiny_model, merge: Callable, tmp_path: Path
):
    checkpoint = checkpoint_of(make_tiny_model(), tmp_path / "step")
    for option, named in (({"use_score": True}, "--use_score"), ({"lang": "zh"}, "--lang zh")):
        with pytest.raises(UserError, match=f"no score head in this checkpoint; leave {named} out"):
            merge(checkpoint, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["merge", "--backend", "fsdp", "--use_score"], None),
        (["merge", "--backend", "fsdp"], None),
        (["--use_score", "--lang", "zh"], None),
        (["merge", "--backend", "megatron"], "error: --backend megatron: only fsdp is supported here"),
        (["test", "--backend", "fsdp"], "error: command test: only merge is supported here"),
    ],
)
def test_the_command_line_of_verls_merger_is_understood(
    arguments: list[str], expected: str | None, published, tmp_path: Path, monkeypatch, capsys
):
    folders = ["--local_dir", str(published[1]), "--target_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["model_merger.py", *arguments, *folders])
    main = runpy.run_path(str(SCRIPTS / "model_merger.py"))["main"]
    if expected is None:
        main()
        assert (tmp_path / "out" / "score_module.pt").is_file()
        return
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == f"{expected}\n" and not (tmp_path / "out").exists()


def test_a_tensor_that_does_not_fit_is_named(experiment: tuple[Path, Path], merge: Callable, tmp_path: Path):
    copy = tmp_path / "actor"
    shutil.copytree(experiment[0] / "global_step_3" / "actor", copy)
    path = copy / "huggingface" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"intermediate_size": 96}), encoding="utf-8"
    )
    (copy / CHECKSUM_FILE).unlink()
    wrong = r"12 tensors do not fit .*: model.layers.0.mlp.down_proj.weight has shape \[64, 128\], .*\[64, 96\]"
    with pytest.raises(UserError, match=wrong):
        merge(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_leaves_nothing_behind(experiment: tuple[Path, Path], merge: Callable, tmp_path: Path):
    copy = tmp_path / "actor"
    shutil.copytree(experiment[0] / "global_step_3" / "actor", copy)
    shard = next(copy.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"distcp is damaged"):
        merge(copy, tmp_path / "out")
    (copy / CHECKSUM_FILE).unlink()
    with pytest.raises(UserError, match="cannot be read") as caught:
        merge(copy, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["actor"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["dtensor", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("hybrid", "sharded_tensor"))]
)
def test_shards_of_verl_0_3_become_the_same_model(kind: str, make_tiny_model, merge: Callable, tmp_path: Path):
    source, actor, world = make_tiny_model(tied=False), tmp_path / "actor", 4 if kind == "hybrid" else 2
    actor.mkdir()
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(world), kind, str(source), str(actor)])
        for rank in range(world)
    ]
    assert [process.wait(timeout=300) for process in ranks] == [0] * world
    with pytest.raises(UserError, match=r"no config.json; name the model that was trained with --hf_model_path"):
        merge(actor, tmp_path / "out")
    shutil.copy(source / "score_module.pt", actor)

    merge(actor, tmp_path / "out", hf_model_path=source)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = load_sprm_config(tmp_path / "out", AutoTokenizer.from_pretrained(tmp_path / "out"))
    heads = [load_score_head(path, 64, config).state_dict() for path in (source, tmp_path / "out")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])

    (actor / f"model_world_size_{world}_rank_1.pt").unlink()
    with pytest.raises(UserError, match=f"model_world_size_{world}_rank_1.pt is missing"):
        merge(actor, tmp_path / "again", hf_model_path=source)


def save_like_verl(rank: int, world: int, kind: str, source: Path, folder: Path) -> None:
    """What FSDP1's sharded state dict holds, saved as verl 0.3 does."""
    store = dist.FileStore(str(folder.parent / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    if kind == "sharded_tensor":
        sharded = {name: as_sharded_tensor(tensor, rank, world) for name, tensor in state.items()}
    else:
        shape, names = ((2, world // 2), ("ddp", "fsdp")) if kind == "hybrid" else ((world,), ("fsdp",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        placements = [Replicate(), Shard(0)][-len(shape) :]
        sharded = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in state.items()}
    torch.save(sharded, folder / f"model_world_size_{world}_rank_{rank}.pt")
    dist.destroy_process_group()


def as_sharded_tensor(tensor: torch.Tensor, rank: int, world: int) -> ShardedTensor:
    chunks = tensor.chunk(world)
    offsets = [sum(len(chunk) for chunk in chunks[:rank]), *[0] * (tensor.dim() - 1)]
    local = [ShardOfTensor.from_tensor_and_offsets(chunks[rank], offsets, rank)] if rank < len(chunks) else []
    return init_from_local_shards(local, *tensor.shape)


class Intruder:
    """Something that runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("intruded",)


def test_shards_that_hold_more_than_tensors_are_not_loaded(
    make_tiny_model, merge: Callable, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    actor, source = tmp_path / "actor", make_tiny_model(tied=False)
    actor.mkdir()
    torch.save({"model.norm.weight": Intruder()}, actor / "model_world_size_1_rank_0.pt")
    with pytest.raises(UserError, match=r"rank_0.pt: holds more than tensors"):
        merge(actor, tmp_path / "out", hf_model_path=source)
    (actor / "model_world_size_1_rank_0.pt").write_bytes(b"PK" + bytes(100))
    with pytest.raises(UserError, match=r"rank_0.pt: the file is damaged"):
        merge(actor, tmp_path / "out", hf_model_path=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor"]


def test_values_that_training_has_broken_are_named(make_tiny_model, merge: Callable, tmp_path: Path):
    source = make_tiny_model(tied=False)
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    state["model.norm.weight"][3] = torch.nan
    (tmp_path / "actor").mkdir()
    torch.save(state, tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    with pytest.raises(UserError, match=rf"^{tmp_path}/actor: model.norm.weight holds values that are not finite"):
        merge(tmp_path, tmp_path / "out", hf_model_path=source)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_finite_is_named(make_tiny_model, merge: Callable, tmp_path: Path):
    source, actor = make_tiny_model(tied=False), tmp_path / "actor"
    actor.mkdir()
    torch.save(AutoModelForCausalLM.from_pretrained(source).state_dict(), actor / "model_world_size_1_rank_0.pt")
    head = torch.load(source / SCORE_MODULE_FILE)
    head["3.bias"][0] = torch.inf
    torch.save(head, actor / SCORE_MODULE_FILE)
    with pytest.raises(UserError, match=rf"^{actor}/{SCORE_MODULE_FILE}: 3.bias holds weights that are not finite"):
        merge(tmp_path, tmp_path / "out", hf_model_path=source)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_head_is_not_finite_is_neither_gone_on_from_nor_merged(
    process_group, make_tiny_model, merge: Callable, tmp_path: Path
):
    source, actor = make_tiny_model(tied=False), tmp_path / "actor"
    sprm_config = load_sprm_config(source, AutoTokenizer.from_pretrained(source))
    model = shard_model(build_joint_model(source, sprm_config=sprm_config), create_mesh())
    optimizer = JointOptimizer(model, adam(), adam())
    with torch.no_grad():
        model.score_head[3].bias.fill_(torch.nan)
    save_checkpoint(actor, model, optimizer, ModelFiles.read(source), sprm_config)
    with pytest.raises(UserError, match=rf"^{actor}: score_head.3.bias holds weights that are not finite"):
        load_checkpoint(actor, model, optimizer)
    with pytest.raises(UserError, match=rf"^{actor}: score_head.3.bias holds values that are not finite"):
        merge(tmp_path, tmp_path / "out")


def test_a_disk_that_is_full_or_only_readable_is_one_line(
    experiment: tuple[Path, Path], merge: Callable, small_disk: Path, remount: Callable[[str], None]
):
    with pytest.raises(
        UserError, match=rf"^{small_disk}/out: cannot be .*No space left on device.*; make room"
    ) as refused:
        merge(experiment[0], small_disk / "out")
    assert "\n" not in str(refused.value)
    assert not list(small_disk.iterdir())
    remount("ro")
    with pytest.raises(UserError, match=rf"^{small_disk}/out: cannot be written .*Read-only.*can be written\)$"):
        merge(experiment[0], small_disk / "out")


def test_an_output_that_cannot_be_made_is_told_before_the_sums_are_checked(
    experiment: tuple[Path, Path], merge: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(merge.__globals__, "check_sums", None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    for target, why in (
        (tmp_path / ("n" * 250), "choose a shorter path"),
        (tmp_path / "file" / "out", "another folder"),
    ):
        with pytest.raises(UserError, match=rf"^{target}: cannot be written .*{why}"):
            merge(experiment[0], target)


class Hub(BaseHTTPRequestHandler):
    """The three routes of the Hub that a push of small files takes."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            name = "{organization}/{name}".format(**json.loads(body))
            self.repositories[name] = {}
            self._answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        else:
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.repositories[name] |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            self._answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1"})

    def _answer(self, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.mark.slow
def test_the_merged_model_is_pushed_whole(experiment: tuple[Path, Path], tmp_path: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    result = run_shell(experiment[0], tmp_path / "out", "--hf_upload_path", "team/model", **variables)
    server.shutdown()
    assert result.returncode == 0, result.stderr
    written = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "score_module.pt", "tokenizer.json"} <= written.keys()
    assert Hub.repositories["team/model"] == written

    server.server_close()
    result = run_shell(experiment[0], tmp_path / "again", "--hf_upload_path", "team/model", **variables)
    assert result.returncode == 2
    assert f"{tmp_path / 'again'} is written, but could not be pushed to team/model" in result.stderr
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_what_is_missing_is_said(merge: Callable, tmp_path: Path):
    with pytest.raises(UserError, match=r"not a checkpoint: expected .* with .metadata"):
        merge(tmp_path, tmp_path / "out")
    result = run_shell()
    assert result.returncode == 2
    assert "LOCAL_DIR (the checkpoint) and TARGET_DIR (the folder to write) missing" in result.stderr


if __name__ == "__main__":
    save_like_verl(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
