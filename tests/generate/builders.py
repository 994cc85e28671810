"""Tiny models that can be talked with: random weights, a byte-level tokenizer, a chat template with a generation prompt."""

import json
from pathlib import Path

from tests.models.builders import save_dense

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}" + TEMPLATE


def save_speaker(directory: Path, template: str | None = TEMPLATE, generation: dict | None = None, **changes) -> Path:
    """A dense model in fp32; `generation` changes generation_config.json, `changes` config.json."""
    import torch

    save_dense(directory, dtype=torch.float32, **{"max_position_embeddings": 512} | changes)
    path = directory / "chat_template.jinja"
    path.unlink()
    if template is not None:
        path.write_text(template)
    if generation:
        change_json(directory / "generation_config.json", **generation)
    return directory


def change_json(path: Path, **changes) -> None:
    """The file with some of its fields changed."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
