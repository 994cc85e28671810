"""A slice of a model: some of its layers, with the embeddings, the last norm and the head that it has.

It is another model than the whole one, and a worse one: its layers see what they were not trained on.  It is for studies on
machines that cannot train the whole.  Weights are copied byte by byte, file by file, without torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pesc.errors import SourceError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_INDEX = "model.safetensors.index.json"


def keep_layers(folder: Path, layers: Sequence[int], what: str) -> int:
    """Cut the model directory `folder` to the layers with these numbers, which are then called 0, 1, 2 ...; returns how many it had.

    what: the source, for sentences.  Raises SourceError for a directory that is no model of safetensors files, or lacks a layer.
    """
    path = folder / "config.json"
    files = sorted(folder.glob("*.safetensors"))
    if not path.is_file() or not files:
        raise SourceError(f"{what}: `layers` cuts a model, but there is no config.json with safetensors files beside it. Leave layers out.")
    fields = json.loads(path.read_text(encoding="utf-8"))
    had = fields.get("num_hidden_layers")
    if not isinstance(had, int) or max(layers) >= had:
        last = "none that it says" if not isinstance(had, int) else f"{had}, from 0 to {had - 1}"
        raise SourceError(f"{what}: `layers` names layer {max(layers)}, but the model has {last}. Name others, or leave layers out.")
    fields = {name: _cut(name, value, had, layers) for name, value in fields.items()} | {"num_hidden_layers": len(layers)}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    kept = {file.name: _keep_tensors(file, layers) for file in files}
    if (folder / _INDEX).is_file():
        _write_index(folder / _INDEX, kept)
    return had


def _cut(name: str, value: Any, had: int, layers: Sequence[int]) -> Any:
    """Settings that are given layer by layer, such as layer_types."""
    return [value[number] for number in layers] if "layer" in name and isinstance(value, list) and len(value) == had else value


def _new_name(name: str, layers: Sequence[int]) -> str | None:
    """What a tensor is called in the slice; None for one of a layer that is left out."""
    found = _LAYER.search(name)
    if not found:
        return name
    number = int(found[1])
    return f"{name[: found.start(1)]}{layers.index(number)}{name[found.end(1) :]}" if number in layers else None


def _keep_tensors(file: Path, layers: Sequence[int]) -> dict[str, int]:
    """Rewrite one safetensors file without the tensors of other layers; new name -> bytes of those kept.  A file that keeps none is removed."""
    new = file.with_suffix(".cut")
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        kept = {called: entry for name, entry in entries.items() if (called := _new_name(name, layers))}
        in_order = sorted(kept.items(), key=lambda item: item[1]["data_offsets"])
        sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in in_order}
        written, offset = {name: value for name, value in header.items() if name == "__metadata__"}, 0
        for name, entry in in_order:
            written[name] = {**entry, "data_offsets": [offset, offset := offset + sizes[name]]}
        text = json.dumps(written, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with new.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name, entry in in_order:
                source.seek(8 + length + entry["data_offsets"][0])
                _copy(source, target, sizes[name])
            target.flush()
            os.fsync(target.fileno())
    os.replace(new, file)
    if not kept:
        file.unlink()
    return sizes


def _copy(source: Any, target: Any, size: int) -> None:
    while size:
        data = source.read(min(size, 1 << 20))
        if not data:
            raise SourceError(f"{source.name} ends inside a tensor: it was not fetched whole. Download the model again.")
        target.write(data)
        size -= len(data)


def _write_index(path: Path, kept: dict[str, dict[str, int]]) -> None:
    files = {name: file for file, sizes in kept.items() for name in sizes}
    index = {"metadata": {"total_size": sum(sum(sizes.values()) for sizes in kept.values())}, "weight_map": dict(sorted(files.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
