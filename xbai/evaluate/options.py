"""What an inference run is asked to do, and what is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xbai.errors import UserError
from xbai.evaluate.client import RetryPolicy

if TYPE_CHECKING:
    from xbai.search.strategy import SearchOptions

EFFORTS = {"low": 2, "medium": 8, "high": 32}
"""Candidates among which Best-of-N chooses."""

FURTHER_SAMPLING = ("top_p", "top_k", "repetition_penalty")
SCORE_SOURCES = ("auto", "fused", "service", "none")


def _among_whole_responses() -> SearchOptions:
    # Imported on demand: it needs torch, and the command line only the defaults.
    from xbai.search.strategy import SearchOptions

    return SearchOptions()


@dataclass(frozen=True)
class RunOptions:
    """What to run and how hard.

    Attributes:
        task, input_file, output_file, model_dir: benchmark, its questions, the results, the model (for its tokenizer).
        response_api_url, score_api_url: services, separated by commas.
        n_samples: repetitions of the test; of a search that chooses by steps, how often it is run.
        branch: among how many candidates of each repetition the score chooses.
        response_num: samples of one `/generate` request.
        max_in_flight: requests in flight at one URL.
        score_source: `fused` (scores come with the responses), `service`, `none`, or `auto` (fused where the policy
            service offers the scores that the score service gives, or there is no URL of one; else the service).
        total_parts, part: run only the questions whose index leaves `part` when divided by `total_parts`.
        max_questions: only the first so many.
        selection: the part of a benchmark that has releases or dates (see `LiveCodeBench`).
        search: how a response is found.
        api_key: what the services ask for, if anything.
    """

    task: str
    input_file: str
    output_file: str
    model_dir: str
    response_api_url: str
    score_api_url: str | None = None
    n_samples: int = 1
    branch: int = 1
    response_num: int = 8
    max_in_flight: int = 32
    score_source: str = "auto"
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = -1
    repetition_penalty: float = 1.05
    max_tokens: int = 32768
    stop: tuple[str, ...] = ()
    seed: int | None = 0
    total_parts: int = 1
    part: int = 0
    max_questions: int | None = None
    selection: Mapping[str, str | None] = field(default_factory=dict)
    search: SearchOptions = field(default_factory=_among_whole_responses)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be run, or would be refused by the services for every question."""
        if not 0 <= self.part < self.total_parts:
            raise UserError(f"--part {self.part}: must be from 0 to {self.total_parts - 1} (--total_parts - 1)")
        if self.score_source not in SCORE_SOURCES:
            raise UserError(f"--score_source {self.score_source!r}: use one of {', '.join(SCORE_SOURCES)}")
        if self.score_source == "service" and not self.score_api_url:
            raise UserError("--score_source service needs --score_api_url")
        if self.score_source == "none" and self.search.is_step_search:
            raise UserError(
                f"--score_source none: --search {self.search.name} is guided by scores; use fused or service"
            )
        self._check_request()

    @property
    def candidates(self) -> int:
        """Responses to each question."""
        return self.n_samples * self.branch

    def sampling(self) -> dict[str, Any]:
        """The sampling fields of a `/generate` request; those that not every service knows only where they are set."""
        stop = {"stop": list(self.stop)} if self.stop else {}
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, **stop, **self.further_sampling()}

    def further_sampling(self) -> dict[str, Any]:
        """The sampling fields beyond the published interface that differ from the services' defaults."""
        from xbai.serve.schemas import GenerateRequest

        defaults = {name: GenerateRequest.model_fields[name].default for name in FURTHER_SAMPLING}
        return {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}

    def _check_request(self) -> None:
        """The service's own bounds; its fields have the names of the options."""
        from pydantic import ValidationError

        from xbai.serve.schemas import GenerateRequest

        try:
            GenerateRequest(prefix_prompt="any", response_num=self.response_num, seed=self.seed, **self.sampling())
        except ValidationError as error:
            problem = error.errors()[-1]
            raise UserError(f"--{problem['loc'][0]} {problem['input']!r}: {problem['msg']}") from None


def branch_for(search: SearchOptions, branch: int | None, effort: str | None) -> int:
    """Candidates of each repetition, from the options that say so.

    Raises:
        UserError: they contradict each other.
    """
    if search.is_step_search and (branch, effort) != (None, None):
        raise UserError(
            f"--search {search.name} makes one response a sample: give --beam_width and --expand instead of "
            f"--{'branch' if effort is None else 'effort'}"
        )
    if effort is None:
        return branch or 1
    if effort not in EFFORTS:
        raise UserError(f"--effort {effort!r}: use one of {', '.join(EFFORTS)}")
    if branch not in (None, EFFORTS[effort]):
        raise UserError(f"--effort {effort} means --branch {EFFORTS[effort]}, not {branch}; give one of the two")
    return EFFORTS[effort]
