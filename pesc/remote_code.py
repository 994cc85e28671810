"""Models and tokenizers that bring Python files of their own (`auto_map`): a pipeline never runs them.

What a source brings is data.  `from_pretrained` is called with `trust_remote_code=False` everywhere in a pipeline; transformers then uses its
own class where it has one, and what it would say otherwise is said here first.  Only `pesc generate`, `chat` and `serve` can be told to run
such code, by an option, for the one model that they are given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pesc.errors import ModelError


def refuse_own_code(directory: Path) -> None:
    """Raises ModelError for a model or a tokenizer that transformers has no class for but the one in its directory."""
    fields = _read(directory / "config.json")
    if "auto_map" in fields and not knows_type(fields.get("model_type")):
        raise ModelError(_sentence(directory, f"is of model_type {fields.get('model_type')!r}"))
    tokenizer = _read(directory / "tokenizer_config.json")
    if "auto_map" in tokenizer and not _knows_tokenizer(tokenizer.get("tokenizer_class")) and not knows_type(fields.get("model_type")):
        raise ModelError(_sentence(directory, f"has a tokenizer of class {tokenizer.get('tokenizer_class')!r}"))


def knows_type(model_type: Any) -> bool:
    """Whether transformers, or this package, has a class for a model_type."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _knows_tokenizer(name: Any) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return isinstance(name, str) and any(tokenizer_class_from_name(found) is not None for found in (name, f"{name}Fast"))


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # who loads it says what is wrong
    return fields if isinstance(fields, dict) else {}


def _sentence(directory: Path, what: str) -> str:
    return (
        f"{directory} {what}, which transformers has no class for: it comes with Python files of its own, and a pipeline runs none of a source. Take a "
        "model that transformers knows. `pesc chat DIR --trust-remote-code` runs this one, for those who have read its code."
    )
