"""Observations and held-out blocks made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pesc.routing.counts import LayerChoices, Observation


def make_observation(
    choices, row_of, domain_of, domains=("code", "general", "math"), num_experts: int = 6, entropy: float = 0.0
) -> Observation:
    """choices: for each layer [T, K] experts; row_of [T]; domain_of [R]."""
    layers = []
    for number, chosen in enumerate(choices):
        index_TK = np.asarray(chosen, dtype=np.uint16)
        weight_E = np.bincount(index_TK.flatten(), minlength=num_experts) / index_TK.shape[1]
        layers.append(LayerChoices(number, num_experts, index_TK, weight_E, entropy))
    return Observation(tuple(layers), np.asarray(row_of), np.asarray(domain_of), tuple(domains))


def save_held_out(folder: Path, blocks) -> Path:
    """A tokenize object's held-out blocks.  blocks: (domain, rows), a row being ids, or (ids, labels)."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": [], "domain": []}
    for domain, rows in blocks:
        pairs = [row if isinstance(row, tuple) else (row, row) for row in rows]
        columns["input_ids"].append([token for ids, _ in pairs for token in ids])
        columns["labels"].append([label for _, labels in pairs for label in labels])
        columns["position_ids"].append([place for ids, _ in pairs for place in range(len(ids))])
        columns["domain"].append(domain)
    table = pa.table(columns)
    with pa.OSFile(str(folder / "heldout-00000.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return folder
