"""Which model the copies of a service hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xbai.client.wire import ReadyAnswer
from xbai.errors import UserError
from xbai.model_identity import is_same_model


@dataclass(frozen=True)
class ServedModel:
    """What all copies of a service serve.

    Attributes:
        identity: of the model; None where no copy says.
        lang: the rule by which they find steps; None where they find none.
        scores: every copy returns scores.
        log_probs: every copy returns mean log-probs.
        is_ours: every copy says what it is: a service of this project, which knows more than the published interface.
    """

    identity: str | None
    lang: str | None
    scores: bool
    log_probs: bool
    is_ours: bool

    @classmethod
    def from_copies(cls, option: str, described: Sequence[ReadyAnswer]) -> ServedModel:
        """From the copies' `/ready`.

        Raises:
            UserError: they serve different models, or find steps by different rules; names `option`.
        """
        identities = [copy.identity for copy in described if copy.identity]
        others = {identity for identity in identities if not is_same_model(identity, identities[0])}
        if others:
            raise UserError(f"{option}: the copies serve different models ({', '.join([identities[0], *others])})")
        langs = sorted({copy.lang for copy in described if copy.lang})
        if len(langs) > 1:
            raise UserError(f"{option}: the copies find steps by different rules ({', '.join(langs)})")
        return cls(
            identity=identities[0] if identities else None,
            lang=langs[0] if langs else None,
            scores=all(copy.scores for copy in described),
            log_probs=all(copy.log_probs for copy in described),
            is_ours=all(copy.identity for copy in described),
        )

    def gives_scores_of(self, scorer: ServedModel) -> bool:
        """Whether its scores are those of the scorer: of one model, whose steps both find by one rule."""
        if not self.scores or self.identity is None or scorer.identity is None or self.lang is None:
            return False
        return is_same_model(self.identity, scorer.identity) and self.lang == scorer.lang
