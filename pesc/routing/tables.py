"""The routing as text: a table a layer, and sentences that say no more than the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pesc.markdown import markdown_table
from pesc.routing.results import Agreement, RoutingResult, Specialisation

HEAD = ("layer", "busiest", "entropy", "certainty", "dead", "information", "by chance", "p, Holm")
CAPTIONS = {
    "domains": "Which experts each domain's tokens chose, in one layer: all choices, the first and the second.",
    "specialisation": "How much the choice of an expert tells of the domain, beside what it tells when the rows' domains are shuffled.",
    "load": "Load of every expert in every layer, over an even one.",
    "pairs": "Experts chosen for the same token, over what experts as busy would be if they were paired at random.",
}
"""What `plots.draw` shows, in the order of the page."""
NOTES = (
    "busiest: load of the busiest expert over an even one. entropy: of the load, 1 is balanced. certainty: 1 less the mean entropy of a token's "
    "probabilities. information: of expert and domain in nats, beside the mean of shuffled domains.",
    "Domains separate in an untrained router too, and short rows have a larger share of chat-template tokens: only the difference from the model before "
    "training says what training did (`pesc routing MODEL OTHER`).",
)


def layer_rows(result: RoutingResult) -> list[tuple[str, ...]]:
    """A row a layer, as HEAD names the columns."""
    rows = []
    for entry in result.layers:
        found = entry.specialisation
        information = (f"{found.mutual_information:.4f}", f"{found.null_mean:.4f}", f"{found.p_adjusted:.3f}") if found else ("–",) * 3
        dead = ", ".join(map(str, entry.dead)) or "–"
        rows.append(
            (str(entry.layer), f"{entry.busiest:.2f}", f"{entry.entropy:.3f}", f"{1 - entry.token_entropy:.3f}", dead, *information)
        )
    return rows


def sentences(result: RoutingResult) -> list[str]:
    """What was counted, how even the routing is, and whether experts take to domains."""
    return [f"Nothing was counted: {result.hole}."] if result.hole else list(_sentences(result))


def _sentences(result: RoutingResult) -> Iterator[str]:
    kind = "tokens" if result.tokens == "all" else "answer tokens"
    parts = ", ".join(f"{d.name} {d.rows:,} rows and {d.tokens:,} tokens" for d in result.domains)
    yield f"{result.num_tokens:,} {kind} of {result.num_rows:,} rows ({parts}), {len(result.layers)} sparse layers, top-{result.top_k}."
    busiest = max(result.layers, key=lambda entry: entry.busiest)
    dead = sum(len(entry.dead) for entry in result.layers)
    experts = sum(len(entry.load) for entry in result.layers)
    yield (
        f"The busiest expert has {busiest.busiest:.1f} times an even load (layer {busiest.layer}); {dead:,} of {experts:,} experts are dead "
        "(under 1 % of an even load)."
    )
    if result.overall is None:
        yield "All rows are of one domain, so nothing is said of specialisation."
        return
    sure = sum(bool(entry.specialisation and entry.specialisation.p_adjusted < 0.05) for entry in result.layers)
    verdict = _verdict(result.overall)
    yield f"{verdict} In {sure} of {len(result.layers)} layers it is more than chance by itself (p < 0.05, Holm)."


SUMMARY_HEAD = ("arm", "busiest", "entropy", "certainty", "dead", "information", "by chance", "p")


def summary_rows(arms: Mapping[str, RoutingResult]) -> list[tuple[str, ...]]:
    """A row a model, means over its layers (dead: all of them), as SUMMARY_HEAD names the columns."""
    rows = []
    for arm, result in arms.items():
        layers, found = result.layers, result.overall
        if not layers:
            rows.append((arm, *["–"] * (len(SUMMARY_HEAD) - 1)))
            continue
        means = [sum(values) / len(layers) for values in zip(*((e.busiest, e.entropy, 1 - e.token_entropy) for e in layers), strict=True)]
        dead = f"{sum(len(entry.dead) for entry in layers)} of {sum(len(entry.load) for entry in layers)}"
        information = (f"{found.mutual_information:.4f}", f"{found.null_mean:.4f}", f"{found.p:.2g}") if found else ("–",) * 3
        rows.append((arm, f"{means[0]:.2f}", f"{means[1]:.3f}", f"{means[2]:.3f}", dead, *information))
    return rows


def _verdict(found: Specialisation) -> str:
    numbers = f"{found.mutual_information:.4f} nats a choice, {found.null_mean:.4f} with shuffled domains, p = {found.p:.2g}"
    if found.p < 0.05:
        return f"The choice of an expert depends on the domain ({numbers}, mean of the layers)."
    return f"No dependence of the choice on the domain can be shown ({numbers}, mean of the layers)."


AGREEMENT_HEAD = ("layer", "same experts", "by chance", "overlap", "same first", "matched: same experts", "by chance")


def agreement_rows(agreement: Agreement) -> list[tuple[str, ...]]:
    """A row a layer, in % of the tokens, as AGREEMENT_HEAD names the columns."""
    rows = []
    for entry in agreement.layers:
        plain, matched = entry.plain, entry.matched
        values = (plain.same_set, entry.chance.same_set, plain.overlap, plain.first, matched.same_set, entry.matched_chance.same_set)
        rows.append((str(entry.layer), *(f"{100 * value:.1f}" for value in values)))
    return rows


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns, for a terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows))


def routing_markdown(arms: Mapping[str, RoutingResult], level: int = 2) -> str:
    """The arms' routing as a section; empty without arms."""
    parts = [f"{'#' * level} Routing"] if arms else []
    for arm, result in arms.items():
        parts.append(f"**{arm}**: " + " ".join(sentences(result)))
        if result.layers:
            parts.append(markdown_table(HEAD, layer_rows(result), numbers=range(len(HEAD))))
    return "\n\n".join([*parts, *NOTES]) + "\n" if arms else ""
