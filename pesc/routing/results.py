"""The schema of routing.json.

D domains, E experts of a layer, K choices of a token.  Shares are of 1, information is in nats, layers have the model's own numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

NAME = "routing.json"


class Record(BaseModel):
    """Frozen and closed; no infinity, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Specialisation(Record):
    """How much a choice of an expert tells of the domain, beside what rows with shuffled domains tell."""

    mutual_information: float
    """Of the D x E table of choices, as counted (plug-in)."""
    miller_madow: float
    """The same less the bias of that many choices, if they were independent of one another.  They are not: `null_mean` is larger."""
    null_mean: float
    """Mean over the permutations: what rows of that size give by chance."""
    null_95: float
    """95 % of the permutations are at or below."""
    p: float
    """(1 + permutations with at least as much) / (1 + permutations)."""
    p_adjusted: float
    """Over the layers (Holm)."""

    @property
    def excess(self) -> float:
        """Mutual information above chance."""
        return self.mutual_information - self.null_mean


class LayerRouting(Record):
    """One layer's router."""

    layer: int
    load: tuple[float, ...]
    """Share of all choices, [E]."""
    gate_weight: tuple[float, ...]
    """Mean weight of the expert where it was chosen, [E]; 0 where it never was."""
    entropy: float
    """Of `load` over its maximum ln E: 1 is balanced."""
    token_entropy: float
    """Mean entropy of a token's probabilities (softmax over all experts) over ln E: 1 is undecided, 0 is certain."""
    dead: tuple[int, ...]
    """Experts with less than 1/(100 E) of the choices."""
    choices: dict[str, tuple[tuple[int, ...], ...]]
    """Domain -> [K][E]: tokens whose first, second ... choice the expert was."""
    pairs: tuple[tuple[int, ...], ...]
    """Tokens that chose both, [E][E], the diagonal 0."""
    lift: tuple[tuple[float | None, ...], ...]
    """Pairs over what experts as busy as these, but paired at random, would have, [E][E]; None on the diagonal and where that is less than 1."""
    specialisation: Specialisation | None = None
    """None with fewer than two domains."""

    @property
    def busiest(self) -> float:
        """Load of the busiest expert times E: 1 is balanced."""
        return max(self.load) * len(self.load)


class DomainRows(Record):
    """What was counted of one domain."""

    name: str
    rows: int
    tokens: int


class RoutingResult(Record):
    """The routing of one model on some rows."""

    schema_version: int = 1
    top_k: int = 0
    tokens: str = "all"
    domains: tuple[DomainRows, ...] = ()
    layers: tuple[LayerRouting, ...] = ()
    permutations: int = 0
    overall: Specialisation | None = None
    """Of the mean over the layers: one test for the model."""
    hole: str = ""
    """Why nothing was counted."""

    @property
    def num_rows(self) -> int:
        """Rows of all domains."""
        return sum(domain.rows for domain in self.domains)

    @property
    def num_tokens(self) -> int:
        """Counted tokens of all domains."""
        return sum(domain.tokens for domain in self.domains)

    @property
    def shown_layer(self) -> int:
        """The layer that is shown where one is: in the middle (of 32: layer 15, the paper's)."""
        return self.layers[(len(self.layers) - 1) // 2].layer

    def at(self, layer: int) -> LayerRouting:
        """One layer.  Raises KeyError when the model has no router there."""
        found = {entry.layer: entry for entry in self.layers}
        return found[layer]


class Shares(Record):
    """How alike two routers choose, over the tokens."""

    same_set: float
    """Tokens with the same K experts."""
    overlap: float
    """Mean over the tokens of common experts over all experts that either chose (Jaccard)."""
    first: float
    """Tokens with the same first choice."""


class LayerAgreement(Record):
    """One layer of two checkpoints."""

    layer: int
    plain: Shares
    """Expert for expert."""
    chance: Shares
    """The same when the second model's tokens are shuffled: what loads alone give."""
    matched: Shares
    """After the best matching of the experts."""
    matched_chance: Shares
    """The best matching on shuffled tokens."""
    matching: tuple[int, ...]
    """Expert of the first model -> expert of the second, [E]."""


class Agreement(Record):
    """Two checkpoints on the same tokens."""

    model: str
    other: str
    num_tokens: int
    layers: tuple[LayerAgreement, ...]


def write_result(folder: Path, result: RoutingResult) -> None:
    """routing.json, the same bytes for the same result."""
    text = json.dumps(result.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_result(folder: Path) -> RoutingResult:
    """Read what `write_result` wrote.  Raises OSError or ValueError when it is not there, or of another schema."""
    return RoutingResult.model_validate_json((folder / NAME).read_text(encoding="utf-8"))
