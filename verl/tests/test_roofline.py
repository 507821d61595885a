"""The roofline model counts what the trainer's model computes: FLOPs and bytes of a tiny one, made up by hand."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import ppo_config
from transformers import AutoConfig

from verl.models.log_probs import LOGITS_PER_CHUNK
from verl.trainer.planning.model_shapes import ModelShape
from xbai.errors import UserError

BENCH = Path(__file__).parents[2] / "bench"
SIZES = {
    "vocab_size": 1999,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SEQUENCES, PROMPT = [96, 40], 8


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module("roofline")
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def config():
    return AutoConfig.for_model("qwen2", **SIZES)


def _flops(ops: list, *kinds: str) -> float:
    return sum(op.flops for op in ops if op.kind in kinds)


def test_flops_are_model_flops_and_what_checkpointing_repeats(roofline: ModuleType, config) -> None:
    work = roofline.Work(config, SEQUENCES, PROMPT, entropy=True, trains=True)
    shape, tokens = ModelShape.from_config(config), sum(SEQUENCES)
    plain, kept, *_ = (work.ops(variant) for variant in (roofline.Variant("all"), roofline.Variant("kept", False)))
    layers = 2.0 * shape.layers * shape.layer_matrices * tokens
    # The score head's product on one step in 64 tokens is among them.
    assert _flops(kept, "GEMM") == pytest.approx(3 * layers, rel=0.01)
    # A layer's last product is not computed again: nothing needs it.
    down = 2.0 * shape.layers * shape.mlp * shape.hidden * tokens
    assert _flops(plain, "GEMM") == pytest.approx(4 * layers - down, rel=0.01)
    pairs = sum(length * (length + 1) // 2 for length in SEQUENCES)
    product = 2.0 * shape.layers * shape.query_size * pairs
    assert _flops(kept, "attention") == (2 + 5) * product
    assert _flops(plain, "attention") == (2 + 2 + 5) * product
    # Chunks of logits are computed again in any case.
    head = 2.0 * shape.embedding_parameters * work.predicted
    assert _flops(kept, "head GEMM") == _flops(plain, "head GEMM") == 4 * head
    forward = roofline.Work(config, SEQUENCES, PROMPT, entropy=False, trains=False)
    assert _flops(forward.ops(roofline.Variant("all")), "GEMM", "attention", "head GEMM") == pytest.approx(
        forward.model_flops, rel=0.01
    )


def test_each_variant_saves_what_it_is_for(roofline: ModuleType, config) -> None:
    work = roofline.Work(config, SEQUENCES, PROMPT, entropy=True, trains=True)
    rates = roofline.Rates(1e12, 1e12, (1e12, 1e12), (2e12, 2e12), bandwidth=1e12, latency=0.0)
    plain, fused, liger, attention_3, kept = (
        roofline.modelled(work, variant, rates)["seconds"] for variant in roofline.variants()
    )

    def changed(before: dict, after: dict) -> set[str]:
        assert all(after[kind] <= before[kind] for kind in roofline.KINDS)
        return {kind for kind in roofline.KINDS if after[kind] < before[kind]}

    assert changed(plain, fused) == {"head elementwise"}
    assert changed(fused, liger) == {"elementwise"}
    assert changed(liger, attention_3) == {"attention"}
    assert attention_3["attention"] == pytest.approx(liger["attention"] / 2)
    assert changed(attention_3, kept) == {"GEMM", "attention", "elementwise"}


def test_a_fused_head_moves_its_logits_a_few_times(roofline: ModuleType, config) -> None:
    assert sum(SEQUENCES) * SIZES["vocab_size"] < LOGITS_PER_CHUNK, "one chunk"
    fused = roofline.Variant("fused", fused_head=True)

    def moved(entropy: bool, trains: bool) -> float:
        work = roofline.Work(config, SEQUENCES, PROMPT, entropy, trains)
        logits = work.predicted * SIZES["vocab_size"]
        ops = [op for op in work.ops(fused) if op.kind == "head elementwise" and op.size >= logits]
        return sum(op.size for op in ops) / logits

    # At two or four bytes a logit: read, once more for the entropy.
    once = moved(entropy=False, trains=False)
    assert once in (2.0, 4.0)
    assert moved(entropy=True, trains=False) == 2 * once


@pytest.mark.long
def test_the_command_prints_a_table_and_writes_it(
    roofline: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", **SIZES}), encoding="utf-8")
    overrides = [f"actor_rollout_ref.model.path={model}", "data.max_prompt_length=16", "data.max_response_length=112"]
    overrides += [f"{key}=256" for key in BUDGETS]
    roofline.main(overrides, recipe="single", mean_length=64, prompt=8, out=tmp_path / "out.json")
    *table, last = capsys.readouterr().out.strip().splitlines()
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert json.loads(last) == written
    assert written["phases"]["update"].keys() == {variant.name for variant in roofline.variants()}
    assert all(figures["tokens"] == 256 for phase in written["phases"].values() for figures in phase.values())
    assert len([line for line in table if line.startswith("|")]) == 2 + 2 * 4 + 5


BUDGETS = [
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["actor_rollout_ref.model.path=nowhere"], "no estimate for nowhere"),
        (["actor_rollout_ref.model.use_remove_padding=false"], "only packed sequences"),
    ],
)
def test_what_cannot_be_modelled_is_one_line(roofline: ModuleType, overrides: list[str], says: str) -> None:
    base = ["actor_rollout_ref.model.path=Qwen2.5-7B", "data.train_files=nowhere.parquet", "trainer.device=cuda"]
    packed = "actor_rollout_ref.model.use_remove_padding=true"
    config = ppo_config([*base, packed, *overrides])
    with pytest.raises(UserError, match=says):
        roofline.roofline(config, 1024, 128, rates=None)
