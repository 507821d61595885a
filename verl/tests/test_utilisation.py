"""Model FLOPs are those of the products that torch makes, and utilisation is their share of a GPU's peak."""

from __future__ import annotations

import pytest
import torch
from tiny import ppo_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from verl import DataProto
from verl.trainer.planning.model_shapes import ModelShape, known_config
from verl.trainer.ppo.utilisation import TRAINING, Utilisation
from verl.utils.device_peaks import peak_tflops

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
MODEL = "DeepSeek-R1-Distill-Qwen-1.5B"


def _model(kind: str):
    config = AutoConfig.for_model(kind, **SMALL)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager"), ModelShape.from_config(config)


def _counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_forward_flops_are_those_of_tokens_that_attend_to_the_past_alone(kind: str) -> None:
    model, shape = _model(kind)
    lengths, predicted = [7, 12], 5

    @torch.no_grad()
    def decode() -> None:
        # One token at a time: attention to what follows is never computed, so nothing is counted that is masked.
        for length in lengths:
            cache = DynamicCache(config=model.config)
            for position in range(length):
                model.model(torch.tensor([[position]]), past_key_values=cache)
        model.lm_head(torch.zeros(predicted, shape.hidden))

    assert _counted(decode) == shape.sequence_flops(lengths, predicted)


@pytest.mark.parametrize("with_lm_head", [True, False])
def test_training_takes_three_times_as_many(with_lm_head: bool) -> None:
    model, shape = _model("qwen2")
    tokens, predicted = 9, 4 * with_lm_head

    def train() -> None:
        hidden = model.model(torch.arange(tokens)[None]).last_hidden_state[0]
        (model.lm_head(hidden[:predicted]).sum() + hidden.sum()).backward()

    # All pairs: eager attention computes what it masks.
    forward = shape.forward_flops(tokens, context=tokens, predicted=predicted)
    assert _counted(train) == TRAINING * forward


def _utilisation(device_name: str | None, *overrides: str, critic: bool = False) -> Utilisation:
    base = [f"actor_rollout_ref.model.path={MODEL}", "data.train_files=nowhere.parquet", "trainer.device=cuda"]
    estimator = ["algorithm.adv_estimator=gae"] if critic else []
    return Utilisation(ppo_config([*base, *estimator, *overrides]), device_name)


def _batch() -> DataProto:
    """Two responses of 3 and 5 tokens to one prompt of 4, padded."""
    response = torch.arange(6) < torch.tensor([[3], [5]])
    prompt = torch.tensor([[0, 1, 1, 1, 1]] * 2)
    columns = {"attention_mask": torch.cat([prompt, response.long()], 1), "response_mask": response}
    return DataProto.from_dict({"kinds": torch.arange(2), **columns})


TIMES = {"timing_s/rollout": 5.0, "timing_s/weight_sync": 1.0, "timing_s/generate": 3.0, "timing_s/step": 16.0}


def test_each_phase_is_its_share_of_the_peak() -> None:
    shape = ModelShape.from_config(known_config(MODEL))
    seconds = {"old_log_prob": 1.0, "ref": 2.0, "values": 0.5, "update_actor": 3.0, "update_critic": 4.0}
    timing = TIMES | {f"timing_s/{phase}": value for phase, value in seconds.items()}
    sizes = ["trainer.nnodes=2", "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_epochs=2"]
    found = _utilisation("NVIDIA H100 80GB HBM3", *sizes, critic=True).metrics(_batch(), timing)

    forward, values = shape.sequence_flops([7, 9], 8), shape.sequence_flops([7, 9], 0)
    flops = {
        "generate": forward - shape.sequence_flops([4], 0),
        "old_log_prob": forward,
        "ref": forward,
        "values": values,
        "update_actor": 3 * 2 * forward,
        "update_critic": 3 * 2 * values,
    }
    seconds |= {"generate": 4.0, "step": 16.0}
    flops["step"] = sum(flops.values())
    gpus, peak = 16, 989e12
    expected = {f"perf/mfu/{phase}": count / seconds[phase] / gpus / peak for phase, count in flops.items()}
    assert found == pytest.approx(expected | {"perf/generation_share": 4 / 16})


def test_with_gpus_for_rollouts_each_phase_is_of_its_own() -> None:
    shape = ModelShape.from_config(known_config(MODEL))
    timing = TIMES | {"timing_s/rollout_wait": 0.5, "timing_s/update_actor": 2.0}
    sizes = ["trainer.nnodes=1", "trainer.rollout_gpus=4", "actor_rollout_ref.rollout.n=2"]
    found = _utilisation("NVIDIA H100 80GB HBM3", *sizes).metrics(_batch(), timing)
    forward, peak = shape.sequence_flops([7, 9], 8), 989e12
    sampled = forward - shape.sequence_flops([4], 0)
    assert found == pytest.approx(
        {
            "perf/mfu/generate": sampled / 5.0 / 4 / peak,
            "perf/mfu/update_actor": 3 * forward / 2.0 / 8 / peak,
            "perf/mfu/step": (sampled + 3 * forward) / 16.0 / 12 / peak,
            "perf/generation_share": 0.5 / 16,
        }
    )


def test_the_kl_over_the_vocabulary_asks_for_the_reference_too() -> None:
    full = "actor_rollout_ref.actor.kl_loss_type=full"
    timing = TIMES | {"timing_s/update_actor": 1.0}
    plain, with_reference = (_utilisation("NVIDIA A100", *more).metrics(_batch(), timing) for more in ((), (full,)))
    ratio = with_reference["perf/mfu/update_actor"] / plain["perf/mfu/update_actor"]
    assert ratio == pytest.approx((TRAINING + 1) / TRAINING)


@pytest.mark.parametrize("device", [None, "NVIDIA Future 9000"])
def test_without_a_known_peak_there_is_no_share_of_it(device: str | None) -> None:
    found = _utilisation(device).metrics(_batch(), TIMES)
    assert found.keys() == {"perf/generation_share", "perf/tflops/generate", "perf/tflops/step"}
    assert _utilisation(device, "trainer.device_tflops=2").metrics(_batch(), TIMES)["perf/mfu/step"] == pytest.approx(
        found["perf/tflops/step"] / 2
    )


def test_another_kind_of_model_is_not_guessed() -> None:
    # As of a folder whose config.json names a kind that is not counted.
    found = _utilisation("NVIDIA A100", "actor_rollout_ref.model.path=nowhere").metrics(_batch(), TIMES)
    assert found == {"perf/generation_share": 0.25}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A4000", None),
        (None, None),
    ],
)
def test_peaks_go_by_whole_words_of_the_name(name: str | None, peak: float | None) -> None:
    assert peak_tflops(name, torch.bfloat16) == peak
    assert peak_tflops(name, torch.float32) is None
