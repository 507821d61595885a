"""Which positions of a response are reasoning steps, and what their scores make of it (arXiv 2507.01951, section 3.2).
Training and serving both ask this one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from xbai.sprm.step_rule import StepRule
from xbai.sprm.tags import THINK_CLOSE, THINK_OPEN, tag_ends

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Int, Shaped

StepLogits: TypeAlias = 'Float[Tensor, "batch time"]'
"""The head's raw outputs, of no meaning where there is no step."""
StepMask: TypeAlias = 'Bool[Tensor, "batch time"]'
"""True at steps: at all of them (a `feature_mask`), or at those that count."""
Outcomes: TypeAlias = 'Shaped[Tensor, "batch"]'
"""Labels: 1 for a trajectory whose final answer is right, 0 for a wrong one; or, as `graded`, whether anybody knows."""


def step_feature_mask(
    input_ids: Int[Tensor, "batch time"], response_mask: Shaped[Tensor, "batch time"], rule: StepRule
) -> Bool[Tensor, "batch time"]:
    """Mark the position just before each step token: its hidden state is the feature of the step.

    Only step tokens inside the response's thinking region count. It begins at the response's start where the prompt
    ends inside an open `<think>` (the last tag before the response is one), else after the response's first `<think>`,
    else at its start. It ends at the first `</think>` after that, or at the response's end. Of consecutive step tokens
    the first counts; one at the region's very start does not.

    Args:
        input_ids: prompts included; their padding may be on either side.
        response_mask: true on response tokens (a contiguous run per row).
        rule: the model's.
    """
    response = response_mask.bool()
    is_step = torch.isin(input_ids, torch.tensor(rule.step_ids, device=input_ids.device)) & response
    begin, end = _thinking_region(input_ids, response, rule)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    counted = is_step & (positions > begin) & (positions < end)
    counted[:, 1:] &= ~is_step[:, :-1]
    return torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)


def step_positions(ids: Sequence[int], response_start: int, rule: StepRule) -> list[int]:
    """Where the features of the steps are in one sequence, whose response begins at `response_start`."""
    mask = step_feature_mask(torch.tensor([ids]), torch.arange(len(ids))[None] >= response_start, rule)
    positions: list[int] = mask[0].nonzero().flatten().tolist()
    return positions


def step_ends(positions: Sequence[int], response_start: int) -> list[int]:
    """How many tokens of the response there are up to and including each step's token, which follows its feature."""
    return [position + 2 - response_start for position in positions]


def step_scores(
    prompt_ids: Sequence[int], token_ids: Sequence[int], step_logits: Sequence[float], rule: StepRule
) -> tuple[list[float], list[int]]:
    """The scores of a generated response's steps, in float32, and where the steps end (see `step_ends`).

    Args:
        prompt_ids: the prompt, which may end inside of the thinking region.
        token_ids: the response.
        step_logits: for each of its tokens the head's output on the hidden state that the token was sampled from: the
            feature of the step, where the token ends one.
        rule: which tokens do.
    """
    ends = step_ends(step_positions([*prompt_ids, *token_ids], len(prompt_ids), rule), len(prompt_ids))
    scores: list[float] = torch.tensor([step_logits[end - 1] for end in ends]).sigmoid().tolist()
    return scores, ends


def trajectory_scores(step_logits: StepLogits, feature_mask: StepMask) -> Float32[Tensor, "batch"]:
    """Geometric mean of each row's step scores, in float32 log space: in (0, 1), or 0.0 for a row without a step."""
    log_scores = F.logsigmoid(step_logits.float()).masked_fill(~feature_mask, 0.0)
    steps = feature_mask.sum(-1)
    return torch.where(steps > 0, torch.exp(log_scores.sum(-1) / steps.clamp(min=1)), 0.0)


@dataclass(frozen=True)
class ScoredPart:
    """A part of a response and the scores of its steps, found as if all before the part were prompt."""

    token_ids: Sequence[int]
    step_scores: Sequence[float]


def joined_scores(prompt_ids: Sequence[int], before: ScoredPart, added: ScoredPart, rule: StepRule) -> list[float]:
    """The step scores of a response that was written in two parts.

    The second one alone does not know that the region has ended before it, and a `<think>` in it may begin the region
    anew, after the steps of the first. It has no score of a step whose token it begins with.
    """
    ids = torch.tensor([[*prompt_ids, *before.token_ids, *added.token_ids]])
    positions, border = torch.arange(ids.shape[1])[None], len(prompt_ids) + len(before.token_ids)
    alone = step_feature_mask(ids, positions >= border, rule)
    whole = step_feature_mask(ids, positions >= len(prompt_ids), rule)
    kept = before.step_scores if (whole & (positions < border - 1)).any() else ()
    # Text from a service may encode to other tokens than those that were generated and scored.
    scores = added.step_scores
    counts = whole[alone].tolist() if int(alone.sum()) == len(scores) else [True] * len(scores)
    return [*kept, *(score for score, counted in zip(scores, counts, strict=True) if counted)]


def _thinking_region(
    input_ids: Int[Tensor, "batch time"], response: Bool[Tensor, "batch time"], rule: StepRule
) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch 1"]]:
    """First position of each row's region and the one after its last."""
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)

    def first(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch 1"]:
        return torch.where(mask, positions, length).amin(1, keepdim=True)

    def last(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch 1"]:
        return torch.where(mask, positions, -1).amax(1, keepdim=True)

    opens, goes_on = tag_ends(input_ids, THINK_OPEN, rule.think_open_id, rule.tag_pieces)
    closes, _ = tag_ends(input_ids, THINK_CLOSE, rule.think_close_id, rule.tag_pieces)
    start = first(response)
    in_prompt = positions < start
    is_open = last(opens & in_prompt) > last(closes & in_prompt)
    opens &= response
    first_open = first(opens)
    behind = torch.where(first(opens & goes_on) == first_open, first_open, first_open + 1)
    begin = torch.where(is_open | (first_open == length), start, behind)
    return begin, first(closes & (positions >= begin))
