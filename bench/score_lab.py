"""What makes a score head choose well? Heads on stored features: losses, layers and data, minutes for a table.

    xbai features TRAIN_RESULTS --task stories --model_path MODEL --layers 14,19,24,28 --output FEATURES/train
    xbai features TEST_RESULTS --task stories --model_path MODEL --layers 14,19,24,28 --output FEATURES/test
    python bench/score_lab.py FEATURES/train FEATURES/test [--truth TRAIN_RESULTS --model_path MODEL] [--seeds 3]

Each head trains on the responses of the first folder and is judged on those of the second: by AUC within a prompt, and
by Best-of-N, alone and added to the mean log-prob (both standardised), which is free in the same pass. The backbone
stays as it is: what a joint update adds is not measured here. Prints a Markdown table and, as the last line, the JSON
that it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import machine
import numpy as np
import torch
import typer
from rich.progress import track
from score_losses import AgreementWithin, Loss, TrueLabels, late_labels, soft_labels, trained_loss
from torch import Tensor, nn

from verl.utils.dataset.step_dataset import StepDataset
from verl.utils.head_quality import candidates
from xbai.errors import UserError, exit_on_user_error
from xbai.measure.estimators import Estimate
from xbai.measure.graded import GradedQuestion
from xbai.measure.graded_responses import response_files
from xbai.measure.separation import separation
from xbai.measure.strategies import accuracies
from xbai.sprm import FeatureMoments, ScoreHead, ScoreObjective
from xbai.sprm.step_features import StepFeatures

CPU = torch.device("cpu")
COUNTS = (2, 8, 32)
EVERY_STEP = ScoreObjective(agreement_weighting=False)
STEP_BCE = trained_loss(EVERY_STEP)


@dataclass(frozen=True)
class Variant:
    """One row: a head, and how it learns.

    Attributes:
        title: of the row.
        loss: that it learns by.
        warm_up: epochs by `STEP_BCE` before those.
        chosen_by: how its step scores become the response's, one of `xbai.aggregation.AGGREGATIONS`.
        layer: whose features it sees; None for the last that was kept below the top one, as the published head does.
        share: of the training prompts.
        epochs: over all training prompts; with a share of them as many updates.
        lr: AdamW's.
        standardize: the features.
        linear: logistic regression instead of the head.
    """

    title: str
    loss: Loss = STEP_BCE
    warm_up: int = 0
    chosen_by: str = "geometric"
    layer: int | None = None
    share: float = 1.0
    epochs: int = 8
    lr: float = 1e-3
    standardize: bool = True
    linear: bool = False


def compared(aggregation: str, loss: str = "pairwise") -> Loss:
    """A loss of whole responses."""
    return trained_loss(replace(EVERY_STEP, loss=loss, aggregation=aggregation))


BEST = compared("mean_logit")


def variants(layers: Sequence[int]) -> list[Variant]:
    """All rows, for features of these layers."""
    published = trained_loss(ScoreObjective())
    return [
        Variant("published: agreement weighting, features as they are", published, lr=1e-4, standardize=False),
        Variant("agreement weighting, standardised", published),
        Variant("agreement weighting after 2 epochs without", published, warm_up=2),
        Variant("agreement weighting with a margin of 1", AgreementWithin(1.0)),
        Variant("step BCE"),
        *(
            Variant(f"step BCE, chosen by {how}", chosen_by=how)
            for how in ("product", "lowest_third", "soft_min", "min")
        ),
        *(Variant(f"late step labels, chosen by {how}", late_labels, chosen_by=how) for how in ("geometric", "min")),
        *(Variant(f"soft step labels, chosen by {how}", soft_labels, chosen_by=how) for how in ("geometric", "last")),
        *(Variant(f"outcome BCE, {how}", compared(how, "outcome_bce")) for how in ("geometric", "product", "soft_min")),
        *(Variant(f"pairwise, {how}", compared(how)) for how in ("geometric", "product", "soft_min", "mean_logit")),
        Variant("step BCE + pairwise, mean_logit", compared("mean_logit", "both")),
        *(Variant(f"pairwise, mean_logit, layer {layer}", BEST, layer=layer) for layer in layers),
        Variant("pairwise, mean_logit, half of the prompts", BEST, share=0.5),
        Variant("pairwise, mean_logit, a quarter", BEST, share=0.25),
        Variant("pairwise, mean_logit, 24 epochs", BEST, epochs=24),
        Variant("pairwise, mean_logit, logistic regression", BEST, linear=True, lr=1e-2),
    ]


@dataclass
class Row:
    """What a way of choosing achieves; per question, the mean over seeds."""

    title: str
    within_prompt_auc: list[float] = field(default_factory=list)
    auc: list[float] = field(default_factory=list)
    best_of_n: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def add(self, questions: Sequence[GradedQuestion], values: Sequence[np.ndarray]) -> None:
        """One seed's head, which gave the candidates of each question these values."""
        separated = separation(values, [question.correct for question in questions])
        self.within_prompt_auc.append(separated.within_prompt_auc.mean)
        self.auc.append(separated.auc)
        chosen = [replace(question, scores=value) for question, value in zip(questions, values)]
        counts = [n for n in COUNTS if n <= min(len(question.correct) for question in questions)]
        for n, per_question in accuracies(chosen, ["best_of_n"], counts)["best_of_n"].items():
            self.best_of_n.setdefault(n, []).append(np.asarray(per_question))

    def to_dict(self, base: dict[str, np.ndarray]) -> dict[str, Any]:
        """JSON-ready; `base` are accuracies per question to compare Best-of-8 with."""
        curves = {n: np.mean(seeds, axis=0) for n, seeds in self.best_of_n.items()}
        return {
            "title": self.title,
            "within_prompt_auc": float(np.mean(self.within_prompt_auc)),
            "within_prompt_auc_of_seeds": self.within_prompt_auc,
            "auc": float(np.mean(self.auc)),
            "best_of_n": {n: asdict(Estimate.over(curve)) for n, curve in curves.items()},
            "best_of_8_less": {name: asdict(Estimate.over(curves[8] - other)) for name, other in base.items()},
        }


class Standardized(nn.Module):
    """A head on features less their mean, over their deviation."""

    def __init__(self, head: nn.Module, moments: FeatureMoments | None) -> None:
        super().__init__()
        self.head = head
        self.mean, self.deviation = (0.0, 1.0) if moments is None else (x.float() for x in moments.standardization)

    def forward(self, features: Tensor) -> Tensor:
        """Features [K, c] to logits [K]."""
        return self.head((features - self.mean) / self.deviation)


def fresh_head(variant: Variant, data: StepDataset, hidden_size: int) -> nn.Module:
    """As it is before its first update."""
    head = nn.Sequential(nn.Linear(hidden_size, 1), nn.Flatten(0)) if variant.linear else ScoreHead(hidden_size)
    if not variant.standardize:
        return Standardized(head, None)
    moments = FeatureMoments(hidden_size)
    for batch in data.in_order():
        moments.add(batch.features)
    return Standardized(head, moments)


def train(variant: Variant, data: StepDataset, hidden_size: int, seed: int) -> nn.Module:
    """A head trained from its start; batches are 16 whole groups."""
    torch.manual_seed(seed)
    model = fresh_head(variant, data, hidden_size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=variant.lr, weight_decay=0.01)
    for epoch in range(variant.warm_up + round(variant.epochs / variant.share)):
        loss_of = STEP_BCE if epoch < variant.warm_up else variant.loss
        for batch in data.epoch(16, seed=1000 * seed + epoch):
            loss = loss_of(batch.rows(model(batch.features)), batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def dataset(folder: Path, layer: int, share: float = 1.0) -> StepDataset:
    """The features of a folder, or those of the first part of its prompts."""
    data = StepDataset([StepFeatures.open(path) for path in response_files([str(folder)])], layer)
    data.groups = data.groups[: max(1, round(share * len(data.groups)))]
    return data


def standardized(values: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Over the candidates of all questions."""
    parts = list(values)
    whole = np.concatenate(parts)
    return [(part - whole.mean()) / (whole.std() or 1.0) for part in parts]


@exit_on_user_error
def main(
    train_folder: Annotated[Path, typer.Argument(help="features of the responses to learn from")],
    test_folder: Annotated[Path, typer.Argument(help="features of the responses to judge by")],
    seeds: Annotated[int, typer.Option(min=1, help="heads of each variant")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="titles of variants")] = None,
    truth: Annotated[Path | None, typer.Option(help="of the stories: what TRAIN_FOLDER was made of")] = None,
    model_path: Annotated[str, typer.Option("--model_path", help="whose tokenizer reads --truth")] = "",
    out: Annotated[Path, typer.Option()] = machine.ROOT / "bench/results/score_lab.json",
) -> None:
    """Train and judge every variant."""
    torch.set_num_threads(1)
    store = StepFeatures.open(response_files([str(train_folder)])[0])
    layers = store.source.layers
    tried = variants(layers)
    if truth is not None:
        labels = TrueLabels.of_stories(truth, model_path, store.source.step_rule)
        tried += [Variant(f"true step labels, chosen by {how}", labels, chosen_by=how) for how in ("geometric", "min")]
    rows = [row for row in tried if only is None or row.title in only]
    if not rows:
        raise UserError(f"--only: there are {', '.join(row.title for row in tried)}")
    hidden_size = store.features.shape[-1]
    measured: list[Row] = []
    test = dataset(test_folder, layers[-1])
    questions = candidates(ScoreHead(hidden_size), test, CPU)
    log_probs = standardized(question.mean_log_probs for question in questions)
    free = Row("mean log-prob")
    free.add(questions, log_probs)
    one = np.array([question.correct.mean() for question in questions])
    base = {"mean log-prob": free.best_of_n[8][0], "one sample": one}
    for variant in track(rows, description=f"heads → {out}"):
        layer = layers[-1] if variant.layer is None else variant.layer
        of_train, of_test = dataset(train_folder, layer, variant.share), dataset(test_folder, layer)
        alone, together = Row(variant.title), Row(f"{variant.title} + log-prob")
        for seed in range(seeds):
            head = train(variant, of_train, hidden_size, seed)
            judged = candidates(head, of_test, CPU)
            chosen_by = (question.scores_by(variant.chosen_by) for question in judged)
            scores = standardized(np.log(np.maximum(score, 1e-12)) for score in chosen_by)
            alone.add(judged, scores)
            together.add(judged, [score + log_prob for score, log_prob in zip(scores, log_probs)])
        measured += [alone, together]
    table = [row.to_dict(base) for row in (free, *measured)]
    result = {
        "machine": machine.describe_machine(),
        "seeds": seeds,
        "train": {"prompts": len(dataset(train_folder, layers[-1]).groups), "layers": list(layers)},
        "test": {"prompts": len(questions), "responses": len(test), "one_sample": asdict(Estimate.over(one))},
        "rows": table,
    }
    typer.echo(to_markdown(result))
    machine.report(result, out)


def to_markdown(result: dict[str, Any]) -> str:
    """The table of docs/results.md: percentages."""
    lines = [
        "| choose by | AUC within a prompt | AUC | Best-of-2 / 8 / 32 | Best-of-8 less mean log-prob |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        best = " / ".join(f"{100 * estimate['mean']:.1f}" for estimate in row["best_of_n"].values())
        less = row["best_of_8_less"]["mean log-prob"]
        difference = f"{100 * less['mean']:+.1f} ±{100 * less['standard_error']:.1f}"
        aucs = f"{100 * row['within_prompt_auc']:.1f} | {100 * row['auc']:.1f}"
        lines.append(f"| {row['title']} | {aucs} | {best} | {difference} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
