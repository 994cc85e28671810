"""The licence fields of a model card: the hub shows them, and without them nobody may use the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pesc.errors import PublishError
from pesc.model_card import CARD_NAME

_HEAD = "a head such as `---`, `license: apache-2.0`, `---`"


def check_card(directory: Path) -> str:
    """The licence that README.md states.  Raises PublishError with how to make a card, or what it lacks."""
    path = directory / CARD_NAME
    if not path.is_file():
        raise PublishError(
            f"{directory} has no model card ({CARD_NAME}), which says under which licence the model may be used. For a model of the store, "
            "`pesc export 'RECIPE:merge[ARM]' --format remote-code --out DIR` writes one; for any other, write it yourself, with "
            f"{_HEAD}."
        )
    block = _read_block(path)
    licence = block.get("license")
    if not licence:
        raise PublishError(f"{path} states no licence: give it {_HEAD} (the base's licence, unless yours may differ).")
    if licence != "other":
        return ", ".join(licence) if isinstance(licence, list) else str(licence)
    name = str(block.get("license_name") or "not stated")
    if name == "not stated":
        raise PublishError(
            f"{path} has `license: other` without saying which: set `license_name` there, or `sources.NAME.license` of the base in the recipe and "
            "export again."
        )
    return name


def _read_block(path: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PublishError(f"The head of {path} cannot be read ({reason}): mend it; it needs {_HEAD}.") from None
