"""What command lines of the public trainers bring acts here, or is answered by what to write; as the README says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl.trainer.config.check import check_config
from verl.trainer.config.compose import as_written, compose_config, read_overrides
from verl.trainer.config.schema import YAML
from verl.trainer.config.upstream_keys import RENAMED, UPSTREAM_KEYS
from verl.trainer.config.validation import default_values
from xbai.errors import UserError

REPOSITORY = Path(__file__).parents[2]
README, README_ZH = REPOSITORY / "README.md", REPOSITORY / "README_zh.md"
TRAINING = REPOSITORY / "docs/training.md"
SCRIPTS = [
    json.loads(line)
    for line in (REPOSITORY / "tests/cases/public_scripts.jsonl").read_text(encoding="utf-8").splitlines()
]
DEFAULTS = default_values(YAML)
BASE = [
    "trainer.device=cuda",
    "actor_rollout_ref.model.path=DeepScaleR-1.5B-Preview",
    "data.train_files=train.parquet",
]


def check(*overrides: str) -> list[str]:
    """What a dry run would miss here; raises as it would."""
    missing: list[str] = []
    check_config(compose_config(YAML, [*BASE, *overrides]), missing.append)
    return missing


def composed(*overrides: str) -> dict:
    return as_written(compose_config(YAML, [*BASE, *overrides]))


def table(page: Path, columns: int, after: str = "") -> list[list[str]]:
    """The rows of the first table with so many columns after a heading."""
    lines = [
        line for line in page.read_text(encoding="utf-8").partition(after)[2].splitlines() if line.startswith("| ")
    ]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    start = next(index for index, row in enumerate(rows) if len(row) == columns)
    end = next((index for index, row in enumerate(rows) if index > start and len(row) != columns), len(rows))
    return rows[start + 1 : end]


def overrides_in(cell: str) -> list[str]:
    """The overrides among the code of a cell, as a shell would split them."""
    words = [word for code in re.findall(r"`([^`]*)`", cell) for word in shlex.split(code)]
    return [word for word in words if re.match(r"\+*[a-z_]+\.[\w.]+=", word) or word == "wandb]"]


HEADING = {README: "## Coming from XBai o4", README_ZH: "## 从 XBai o4"}
ROWS = [row for row in table(README, 2, HEADING[README]) if overrides_in(row[0])]


def test_both_languages_have_the_same_rows():
    def codes(page: Path, columns: int) -> list[list[str]]:
        return [re.findall(r"`([^`]*)`", " ".join(row)) for row in table(page, columns, HEADING[page])]

    for columns in (2, 3):
        assert codes(README, columns) == codes(README_ZH, columns)
    assert len(ROWS) > 10


@pytest.mark.parametrize(("there", "here"), ROWS, ids=lambda cell: cell[:50])
def test_the_readmes_rows_are_what_happens(there: str, here: str):
    batch = ["data.train_batch_size=128", "actor_rollout_ref.actor.ppo_mini_batch_size=64"]
    theirs, ours = overrides_in(there), overrides_in(here)
    if here.startswith("the same"):
        check(*batch, *theirs)
        return
    with pytest.raises(UserError) as refused:
        check(*batch, *theirs)
    assert ours or "leave out" in here
    assert "leave" in str(refused.value) or "write" in str(refused.value)
    check(*batch, *ours)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script["script"])
def test_the_public_scripts_run_once_the_readmes_rows_are_applied(script: dict):
    overrides = script["overrides"]
    for there, here in ROWS:
        theirs = overrides_in(there)
        if not here.startswith("the same") and theirs[0] in overrides:
            overrides = [word for word in overrides if word not in theirs] + overrides_in(here)
    missing = check(*overrides)
    assert {line.partition(":")[0].partition("=")[0] for line in missing} <= {
        *("actor_rollout_ref.model.path", "data.train_files", "data.val_files"),
        "trainer.resume_from_path",
    }


@pytest.mark.parametrize("key", UPSTREAM_KEYS)
def test_a_key_that_is_none_here_is_accepted_or_answered(key: str):
    known = UPSTREAM_KEYS[key]
    for accepted in ("", "''", "null", *known.holds):
        assert read_overrides([f"{plus}{key}={accepted}" for plus in ("", "+", "++")], DEFAULTS) == []
    for form in (f"{key}=77", f"+{key}=77", f"++{key}=77", f"{key}.below='a b'"):
        with pytest.raises(UserError) as refused:
            read_overrides([form], DEFAULTS)
        assert re.fullmatch(rf"{re.escape(form.strip('+'))} cannot act here: [^\n]+", str(refused.value))


def test_no_upstream_key_is_one_of_ours():
    assert not {*UPSTREAM_KEYS, *RENAMED} & DEFAULTS.keys()
    assert set(RENAMED.values()) <= DEFAULTS.keys()


def test_what_to_write_instead_exists():
    for known in UPSTREAM_KEYS.values():
        for key in re.findall(
            r"(?:actor_rollout_ref|critic|data|trainer|ray_init|custom_reward_function)\.[\w.]*\w", known.instead
        ):
            assert any(f"{name}.".startswith(f"{key}.") for name in (*DEFAULTS, *UPSTREAM_KEYS)), key


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("actor_rollout_ref.actor.optim.num_warmup_steps=5", "actor_rollout_ref.actor.optim.lr_warmup_steps", 5),
        ("+critic.optim.num_warmup_steps=null", "critic.optim.lr_warmup_steps", -1),
        ("actor_rollout_ref.score.optim.min_lr_ratio=null", "actor_rollout_ref.score.optim.min_lr_ratio", 0.0),
        ("trainer.resume_from_path=False", "trainer.resume_from_path", None),
        ("trainer.resume_mode=ckpt/global_step_7", "trainer.resume_from_path", "ckpt/global_step_7"),
        ("trainer.resume_mode=ckpt/global_step_7", "trainer.resume_mode", "resume_path"),
        ("+data.shuffle=false", "data.shuffle", False),
        ("data.val_files=", "data.val_files", None),
        ("data.val_files=''", "data.val_files", None),
        ("data.return_raw_chat=", "data.return_raw_chat", False),
        ("trainer.experiment_name='a b, c'", "trainer.experiment_name", "a b, c"),
        ("trainer.project_name=1.5B", "trainer.project_name", "1.5B"),
        ("data.train_files=[a.parquet,'b c.parquet']", "data.train_files", ["a.parquet", "b c.parquet"]),
        (
            "actor_rollout_ref.actor.fsdp_config.model_dtype=bf16",
            "actor_rollout_ref.actor.fsdp_config.model_dtype",
            "bf16",
        ),
    ],
)
def test_values_mean_the_same(override: str, key: str, value: object):
    assert composed(override)[key] == value


def test_an_empty_value_takes_back_what_stood_before():
    assert composed("data.val_files=val.parquet", "data.val_files=")["data.val_files"] is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.shuffle=", "data.shuffle= is empty (is a variable of the shell not set?)"),
        ("data.train_batch_size=", "data.train_batch_size= is empty"),
        ("data.train_files=", "data.train_files= is empty"),
        ("trainer.default_local_dir=", "trainer.default_local_dir= is empty"),
        ("~data.shuffle", "~data.shuffle: a key cannot be removed"),
        ("=3", "'=3' names no key"),
        ("data.train_files=a.parquet,b.parquet", "a.parquet,b.parquet gives several values; write a list in []"),
        ("trainer.save_freq=range(1,3)", "gives several values"),
        ("data.train_files=[]", "data.train_files=[] names no file"),
        ("trainer.logger=[console,", "half of a list"),
        ("wandb]", "half of a list"),
        ("trainer={colour: red}", "unknown configuration key trainer.colour; did you mean"),
        ("trainer={use_model_reward: true}", "trainer.use_model_reward cannot act here: there are no reward models"),
        ("+trainer.colour=red", "trainer.colour is not a key of this trainer"),
        ("trainer.resume_mode=sometimes", "trainer.resume_mode=sometimes is unknown"),
        ("actor_rollout_ref.hybrid_engine=1", "hybrid_engine=1 cannot act here"),
    ],
)
def test_what_cannot_mean_anything_is_one_line(override: str, said: str):
    with pytest.raises(UserError) as refused:
        check(override)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_the_readmes_defaults_are_those_of_the_yaml():
    rows = table(README, 3, HEADING[README])
    assert len(rows) > 25
    for key, theirs, here in ((re.sub("`", "", cell) for cell in row) for row in rows):
        assert OmegaConf.create(f"value: {here}").value == DEFAULTS[key], key
        assert theirs != here


def documented() -> Iterator[str]:
    """A row for each answer: the keys, what is accepted of them, and the answer."""
    keys_of: dict[tuple, list[str]] = {}
    for key, known in UPSTREAM_KEYS.items():
        keys_of.setdefault((known.instead, str(known.holds)), []).append(key)
    for (instead, _), keys in keys_of.items():
        accepted = ", ".join(f"`{value}`" for value in UPSTREAM_KEYS[keys[0]].holds)
        yield f"| {', '.join(f'`{key}`' for key in keys)} | {accepted} | {instead} |"


def test_the_documentation_lists_every_key():
    rows = [
        line
        for line in TRAINING.read_text(encoding="utf-8").partition("## Keys of the public trainers")[2].splitlines()
        if line[:3] == "| `"
    ]
    assert rows == list(documented())


def test_a_public_script_goes_through_the_dry_run(tmp_path: Path):
    """As a user would try it: its settings after ours, in the shell."""
    overrides = [word for word in SCRIPTS[3]["overrides"] if not word.startswith("actor_rollout_ref.model.path=")]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MODEL", "TRAIN_FILES", "VAL_FILES")
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    command = ["bash", REPOSITORY / "scripts/run_single_node.sh", "--dry-run", *overrides]
    done = subprocess.run(
        [*command, "actor_rollout_ref.model.path=Qwen3-32B"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert "Dry run: 8 x 8 GPUs" in done.stdout and "It fits GPUs with" in done.stdout
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: actor_rollout_ref.model.path: Qwen3-32B/config.json: no such file")
