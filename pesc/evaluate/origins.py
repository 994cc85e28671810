"""Where each number of a report comes from, and which results it lacks.

An origin is one object that the report has read: its address in the recipe, its digest (the name of its directory in the store, and
what its manifest records), what on the page it gives, and the command that builds it again from its manifest and compares every byte.
A hole is a benchmark of the recipe that has no result. Both depend on the report's inputs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pesc.evaluate.records import address_order, parse_address
from pesc.markdown import markdown_table

SHOWN_DIGITS = 12
"""Of a digest, on the page and in commands."""
GIVES = {
    "evaluate": "scores, intervals, pairs and verdicts of {arm} on {benchmark}; its settings and samples",
    "train": "training of {arm}: steps, tokens, losses, curves, load of the experts", "merge": "merge proof of {arm}",
    "routing": "how {arm} uses its experts", "heldout": "loss of {arm} on the held-out rows",
    "dedup": "rows read, removed and kept; benchmark questions found", "mix": "the mixture", "tokenize": "tokens and blocks",
}  # fmt: skip
"""What a stage's object gives to the page."""


def find_origins(digests: Mapping[str, str], names: Mapping[str, str]) -> list[dict[str, str]]:
    """One entry an input, measured ones first: address, id (for links), object (whole digest), gives, command.

    digests: address -> digest; names: benchmark -> what the page calls it. Empty where the caller knows no digests.
    """
    order = list(GIVES)
    found = []
    for address, digest in digests.items():
        stage, instance = parse_address(address)
        arm, _, benchmark = instance.partition("/")
        gives = GIVES.get(stage, stage).format(arm=arm, benchmark=names.get(benchmark, benchmark))
        command = f"pesc reproduce {digest[:SHOWN_DIGITS]}"
        found.append({"address": address, "id": origin_id(address), "stage": stage, "object": digest, "gives": gives, "command": command})
    return sorted(
        found, key=lambda entry: (order.index(entry["stage"]) if entry["stage"] in order else len(order), address_order(entry["address"]))
    )


def origin_id(address: str) -> str:
    """Anchor of an origin on the page: letters, digits, dashes and dots."""
    return "from-" + "".join(sign if sign.isalnum() or sign in "-._" else "-" for sign in address).rstrip("-")


def evaluation(arm: str, benchmark: str) -> str:
    """Address of a benchmark of an arm."""
    return f"evaluate[{arm}/{benchmark}]"


def find_holes(expected: Iterable[str], measured: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """The expected benchmarks without a result, in the recipe's order: address, arm, benchmark."""
    there = {evaluation(arm, benchmark) for arm, benchmark in measured}
    holes = []
    for address in expected:
        arm, _, benchmark = parse_address(address)[1].partition("/")
        if address not in there:
            holes.append({"address": address, "arm": arm, "benchmark": benchmark})
    return holes


def holes_sentence(results: Mapping[str, Any]) -> str:
    """What is missing and what that means for the rest; empty when nothing is."""
    holes, names = results["holes"], results["names"]
    if not holes:
        return ""
    missing = ", ".join(f"{hole['arm']} on {names.get(hole['benchmark'], hole['benchmark'])}" for hole in holes)
    count = len(results["comparison"]["cells"])
    return (
        f"{len(holes)} of {count + len(holes)} measurements have no result, because the benchmark did not finish: {missing}. Means, pairs and "
        f"verdicts are over the {count} that are there. Running the recipe again fills in what is missing."
    )


def origins_markdown(results: Mapping[str, Any]) -> str:
    """The origins as a table; empty when none are known."""
    rows = [[entry["address"], entry["object"][:SHOWN_DIGITS], entry["gives"], f"`{entry['command']}`"] for entry in results["origins"]]
    table = markdown_table(["address", "object", "gives", "built again and compared by"], rows)
    return f"## Where each number comes from\n\n{table}\n" if rows else ""
