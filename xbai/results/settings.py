"""What decides the contents of a result file, so that one file never mixes two runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from xbai.calibration import Calibration
from xbai.errors import UserError
from xbai.model_identity import is_same_model
from xbai.search.options import CHOICES
from xbai.seeds import derived_seed

logger = logging.getLogger(__name__)

BEST_OF_N = {"name": "best_of_n"}
MODELS = ("model", "policy", "scorer")
RECORDED = ("policy", "scorer", "lang")
"""What only the services know; a file in which it does not stand goes with any."""


@dataclass(frozen=True)
class RunSettings:
    """The settings that results of one file share. The number of samples is not among them: a run may be extended.

    Attributes:
        model: identity of `--model_dir`, which gives the tokenizer and the chat template.
        questions: digest of the benchmark's prompts.
        search: the search's name and settings.
        policy, scorer: identities of the models that generated and that scored; None where not known, or none did.
        lang: the rule by which the scorer finds steps.
        budget: the `rule` that says how many candidates are sampled and how far, of how many `candidates` at most, and
            the `chance` of a score that it goes by; None where all are.
    """

    task: str
    model: str
    questions: str
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    search: dict[str, Any] = field(default_factory=BEST_OF_N.copy)
    policy: str | None = None
    scorer: str | None = None
    lang: str | None = None
    budget: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as it stands in result files."""
        return {**asdict(self), "stop": list(self.stop)}

    def check_same(self, found: dict[str, Any], path: Path) -> None:
        """Refuse a file that other settings made.

        Raises:
            UserError: names what differs.
        """
        ours = self.to_dict()
        differing = [f"{name}={found.get(name)!r}, now {ours.get(name)!r}" for name in differing_settings(found, ours)]
        if differing:
            raise UserError(
                f"{path} holds results of another run ({'; '.join(differing)}); "
                "choose another --output_file or remove it"
            )

    def completed_by(self, found: Mapping[str, Any]) -> RunSettings:
        """With those of the recorded settings that are known there and not here."""
        recorded: dict[str, Any] = {name: getattr(self, name) or found.get(name) for name in RECORDED}
        return replace(self, **recorded)


def differing_settings(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> list[str]:
    """Names of the settings in which two results differ; none where one does not say how it was made."""
    if one is None or other is None:
        return []
    return [name for name in {**one, **other} if not _agree(name, one, other)]


def _agree(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ours, theirs = one.get(name), other.get(name)
    if ours is None or theirs is None:
        return ours == theirs or name in RECORDED
    return is_same_model(ours, theirs) if name in MODELS else ours == theirs


def settings_made_by(settings: Mapping[str, Any] | None, identity: str, place: str) -> Mapping[str, Any]:
    """Settings of results whose responses and scores are known to be this model's, as a calibration has to.

    Raises:
        UserError: names what differs; `place` names the results.
    """
    known = settings or {}
    for role, made in (("policy", "responses"), ("scorer", "scores")):
        found = known.get(role)
        if found is None:
            raise UserError(f"{place}: does not say which model made the {made}; a calibration is for one model")
        if not is_same_model(found, identity):
            raise UserError(f"{place}: the {made} are by the model {found}, but the calibration is for {identity}")
    return known


def check_calibration(calibration: Calibration, settings: Mapping[str, Any] | None, place: str) -> None:
    """Refuse results for which the calibration was not fitted; say so where it was fitted on these very questions.

    Raises:
        UserError: another model or temperature, or results that do not say by which they were made.
    """
    known = settings_made_by(settings, calibration.identity, place)
    if known.get("temperature") != calibration.temperature:
        raise UserError(
            f"{place}: sampled at temperature {known.get('temperature')}, but the calibration is for "
            f"{calibration.temperature}; fit one by xbai calibrate on results of that temperature"
        )
    if known.get("questions") == calibration.questions:
        logger.warning("%s: the calibration was fitted on these questions; what it brings here flatters it", place)


def search_of(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """Name and settings of a run's search; Best-of-N where the file does not say."""
    return dict((settings or {}).get("search") or BEST_OF_N)


def choice_of(settings: Mapping[str, Any] | None) -> str:
    """How a run with these settings chooses among its samples: by a vote where it asked for one, else by score."""
    name = search_of(settings)["name"]
    return name if name in CHOICES else "best_of_n"


def digest_texts(texts: list[str]) -> str:
    """A short digest of the prompts of a benchmark."""
    return hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()[:16]


def request_seed(seed: int | None, question: int, first_sample: int) -> int | None:
    """The seed of the request for a question's samples from `first_sample` on; None when the run has none."""
    return None if seed is None else derived_seed(seed, question, first_sample)
