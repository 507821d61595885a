"""How hard the model is to think: reasoning efforts as numbers of candidates (arXiv 2507.01951, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from xbai.serve.errors import ServiceError

EFFORTS = {"none": 1, "minimal": 1, "low": 2, "medium": 8, "high": 32}
"""Of each effort, how many candidates think."""
OF_MODEL_NAMES = ("low", "medium", "high")
"""Those that a model's name may end with, for clients that can choose nothing but a model."""


@dataclass(frozen=True)
class ServedModel:
    """A model under the names that clients may call it by.

    Attributes:
        name: the plain one.
        scores: it can choose among candidates.
        default_effort: that of requests which ask for none; by default the lowest that chooses, where the model can.
    """

    name: str
    scores: bool
    default_effort: str | None = None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [self.name, *(f"{self.name}-{effort}" for effort in OF_MODEL_NAMES if self.scores)]

    def candidates(self, model: str | None, effort: str | None, candidates: int | None, param: str) -> int:
        """How many candidates a request wants: by their number, else by its effort, else by its model's name.

        Args:
            param: the field of the effort.

        Raises:
            ServiceError: 404 for another model, 400 for an unknown effort, and for a choice without scores.
        """
        if model not in (None, "", *self.names):
            known = ", ".join(self.names)
            raise ServiceError(
                404, f"model {model!r:.200} is not served here, but {known}", code="model_not_found", param="model"
            )
        if effort is not None and effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            raise ServiceError(
                400, f"{param} {effort!r:.100}: use one of {known}", code="unsupported_value", param=param
            )
        of_name = (model or self.name).removeprefix(f"{self.name}-")
        asked = effort or (of_name if of_name in OF_MODEL_NAMES else self.default_effort)
        asked = asked or ("low" if self.scores else "none")
        count = EFFORTS[asked] if candidates is None else candidates
        if count > 1 and not self.scores:
            field = "candidates" if candidates is not None else param
            raise ServiceError(
                400,
                f"{field}: this model has no score head to choose among {count} candidates with; use effort none",
                code="unsupported_value",
                param=field,
            )
        return count
