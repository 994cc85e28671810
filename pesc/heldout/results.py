"""The schema of heldout.json: a loss for each held-out row.  Nothing in it depends on when or where it was measured."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pesc.errors import EvaluationError

NAME = "heldout.json"


class Record(BaseModel):
    """Frozen and closed; no infinity, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RowLoss(Record):
    """One row."""

    domain: str
    tokens: int = Field(ge=1, description="Supervised tokens: those of the answers.")
    loss: float = Field(ge=0, description="Sum of the cross-entropy over them, in nats.")


class HeldOutResult(Record):
    """The losses of one model."""

    schema_version: int = 1
    rows_sha256: str = Field(description="Of the rows' token ids and what is supervised of them: equal for models that read the same rows.")
    parameters: int = Field(description="All parameters of the model, tied ones counted once.")
    layers: int
    rows: tuple[RowLoss, ...] = Field(min_length=1)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, by name."""
        return tuple(sorted({row.domain for row in self.rows}))

    def rows_of(self, domain: str) -> list[RowLoss]:
        """The rows of one domain, in order."""
        return [row for row in self.rows if row.domain == domain]

    def loss(self, domain: str) -> float:
        """Nats per supervised token of one domain."""
        rows = self.rows_of(domain)
        return sum(row.loss for row in rows) / sum(row.tokens for row in rows)

    @property
    def mean(self) -> float:
        """Mean of the domains' losses, each domain counted once."""
        return sum(map(self.loss, self.domains)) / len(self.domains)


def write_result(folder: Path, result: HeldOutResult) -> None:
    """Write heldout.json."""
    (folder / NAME).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_result(folder: Path) -> HeldOutResult:
    """Read heldout.json.  Raises EvaluationError when it is absent or of another schema."""
    try:
        return HeldOutResult.model_validate_json((folder / NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise EvaluationError(f"A heldout object has no usable {NAME} ({type(error).__name__}); run that action again.") from None
