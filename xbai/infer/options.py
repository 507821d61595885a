"""What an inference run is asked to do, and what is refused before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from xbai.api_key import ApiKeyOptions
from xbai.client.replicas import RetryPolicy
from xbai.errors import UserError
from xbai.search.budget import parse_budget
from xbai.search.options import SearchOptions
from xbai.search.rule import Rule

EFFORTS = {"low": 2, "medium": 8, "high": 32}
"""Candidates among which Best-of-N chooses."""

FURTHER_SAMPLING = ("top_p", "top_k", "repetition_penalty")
SCORE_SOURCES = ("auto", "fused", "service", "none")


@dataclass(frozen=True)
class RunOptions:
    """What to run and how hard."""

    task: str
    """Benchmark: aime24, math500, make10, ..."""
    input_file: str
    """Its questions: .jsonl, .json or .parquet."""
    output_file: str
    """Results; begun ones are continued."""
    model_dir: str
    """Model folder, for tokenizer and chat template."""
    response_api_url: str
    """Policy services, comma-separated."""
    score_api_url: str | None = None
    """Score services, comma-separated."""
    n_samples: Annotated[int, typer.Option(min=1)] = 1
    """Repetitions of the Best-of-N test; of a search by steps, how often it is run."""
    branch: Annotated[int | None, typer.Option(min=1)] = None
    """Candidates of each, among which the score chooses (1); n_samples x branch responses in all."""
    effort: str | None = None
    """low, medium or high: branch 2, 8 or 32."""
    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = 0.95
    """Tokens of the highest probabilities that add up to this share."""
    top_k: int = -1
    """So many of the most probable tokens; -1: no limit."""
    repetition_penalty: float = 1.05
    """Divides the logits of tokens that were there before; 1: none."""
    max_tokens: int = 32768
    """Longest response."""
    stop: tuple[str, ...] = ()
    """May be given several times."""
    seed: int | None = 0
    """Gives the same samples again."""
    response_num: int = 8
    """Responses asked for at once."""
    max_in_flight: Annotated[int, typer.Option(min=1)] = 32
    """Requests at one URL."""
    score_source: str = "auto"
    """fused (with the responses), service, none, or auto: fused where they are the same, else the service."""
    search: SearchOptions = field(default_factory=SearchOptions)
    budget: str | None = None
    """Candidates only where they pay: stop:0.9/2, posterior:0.9/2, majority:0.9/4, prune:0.5@1,2, or prune+stop."""
    answer_once: bool = False
    """Candidates only think, and the best one alone answers."""
    total_parts: Annotated[int, typer.Option(min=1)] = 1
    """Split the questions over processes."""
    part: Annotated[int, typer.Option(min=0)] = 0
    """Which part to run, from 0."""
    max_questions: Annotated[int | None, typer.Option(min=1)] = None
    """Only the first."""
    release: str | None = None
    """Of livecodebench: the problems of release_v1, ..., release_v6."""
    start_date: str | None = None
    """Of livecodebench: contests from this day on, as YYYY-MM-DD."""
    end_date: str | None = None
    """And up to this day, itself included."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    api_key: ApiKeyOptions = field(default_factory=ApiKeyOptions)

    def __post_init__(self) -> None:
        """Refuse what cannot be run, or would be refused by the services for every question."""
        self._check_branch()
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
        self._check_budget()
        self._check_answer_once()
        self._check_request()

    @property
    def rule(self) -> Rule | None:
        """What `budget` names."""
        return None if self.budget is None else parse_budget(self.budget)

    @property
    def request_size(self) -> int:
        """Responses of a request."""
        if self.search.is_step_search:
            return 1
        return self.group_size if self.budget is not None or self.answer_once else self.response_num

    @property
    def group_size(self) -> int:
        """Responses among which the score chooses in each repetition."""
        return EFFORTS[self.effort] if self.effort else self.branch or 1

    @property
    def candidates(self) -> int:
        """Responses to each question."""
        return self.n_samples * self.group_size

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
            GenerateRequest(prefix_prompt="any", response_num=self.request_size, seed=self.seed, **self.sampling())
        except ValidationError as error:
            problem = error.errors()[-1]
            raise UserError(f"--{problem['loc'][0]} {problem['input']!r}: {problem['msg']}") from None

    def _check_budget(self) -> None:
        if self.rule is not None:
            self._check_chooses(f"--budget {self.budget}")

    def _check_answer_once(self) -> None:
        if not self.answer_once:
            return
        self._check_chooses("--answer_once")
        if self.group_size == 1:
            raise UserError("--answer_once: there is one candidate, so nothing to choose; give --branch or --effort")
        if self.rule is not None and self.rule.needs_answers:
            raise UserError(f"--answer_once: --budget {self.budget} compares the answers of all candidates")

    def _check_chooses(self, option: str) -> None:
        if self.search.name != "best_of_n":
            raise UserError(f"{option}: chooses itself, so leave out --search {self.search.name}")
        if self.score_source in ("service", "none"):
            raise UserError(
                f"{option}: goes by scores that come with the responses, not --score_source {self.score_source}"
            )

    def _check_branch(self) -> None:
        if self.search.is_step_search and (self.branch, self.effort) != (None, None):
            raise UserError(
                f"--search {self.search.name} makes one response a sample: give --beam_width and --expand instead of "
                f"--{'branch' if self.effort is None else 'effort'}"
            )
        if self.effort is None:
            return
        if self.effort not in EFFORTS:
            raise UserError(f"--effort {self.effort!r}: use one of {', '.join(EFFORTS)}")
        if self.branch not in (None, EFFORTS[self.effort]):
            raise UserError(
                f"--effort {self.effort} means --branch {EFFORTS[self.effort]}, not {self.branch}; give one of the two"
            )
