"""Which files of a model directory go to others.

Key contracts
- A file goes out when it is known to belong to a model: weights that the index names, settings, tokenizer, card, licence, the code that
  `auto_map` names with what it imports from beside it, and this package's records.  Anything else stays, with a reason.
- The weights are read by their headers: a shard that is missing, cut off or longer than its header says is an error.
"""

from __future__ import annotations

import ast
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.errors import PublishError
from pesc.models.tensor_files import INDEX_NAME, SINGLE_NAME, TensorDirectory

_KNOWN = (
    "config.json", "generation_config.json", "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "ledger.json", "proof.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_REASONS = {
    "a pickle, which runs code when it is read": ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz"),
    "unfinished": ("*.tmp", "*.partial", "*.part", "*.lock", "*.incomplete", "*~"),
    "weights that the model does not name": ("*.safetensors", "*.safetensors.index.json"),
    "code that config.json does not name": ("*.py",),
}


@dataclass(frozen=True)
class Contents:
    """What is sent of a directory."""

    directory: Path
    files: tuple[str, ...]
    """Names with `/`, in order; the model's weights among them."""
    left_out: Mapping[str, str]
    """Name -> why it stays here."""

    def size(self, name: str) -> int:
        """Bytes of one file."""
        return (self.directory / name).stat().st_size

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(map(self.size, self.files))


def select_contents(directory: Path, fields: Mapping[str, Any]) -> Contents:
    """The files of a whole model; `fields` is its config.json.  Raises ModelError for damaged weights, PublishError for missing code."""
    weights = TensorDirectory(directory)
    wanted = set(weights.files.values()) | ({INDEX_NAME} if SINGLE_NAME not in weights.files.values() else set())
    _ = weights.specs  # every header and length
    wanted |= _code_files(directory, fields)
    chosen, left_out = [], {}
    for name in _names(directory):
        if name in wanted or _is_known(name):
            chosen.append(name)
        else:
            left_out[name] = _reason(name)
    return Contents(directory, tuple(chosen), left_out)


def notes(contents: Contents, fields: Mapping[str, Any]) -> list[str]:
    """What a stranger will miss, as sentences; the model can be published without it."""
    found = []
    if not any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in contents.files):
        found.append("there is no tokenizer, so nobody can give the model a text")
    if str(fields.get("model_type", "")).startswith("pesc_") and "auto_map" not in fields:
        found.append("it opens with this package alone; `pesc export MODEL --format remote-code --out DIR` makes one that opens without it")
    return found


def _names(directory: Path) -> list[str]:
    """Files at the top and templates; other directories by their name and a slash."""
    names = []
    for path in sorted(directory.iterdir()):
        if not path.is_dir():
            names.append(path.name)
        elif path.name == _TEMPLATES:
            names += [f"{path.name}/{inner.name}" for inner in sorted(path.iterdir())]
        else:
            names.append(f"{path.name}/")
    return names


def _is_known(name: str) -> bool:
    return not name.endswith(("~", ".tmp")) and any(fnmatch.fnmatchcase(name, pattern) for pattern in _KNOWN)


def _reason(name: str) -> str:
    if name.startswith("."):
        return "hidden"
    if name.endswith("/"):
        return "a directory"
    return next((reason for reason, patterns in _REASONS.items() if _matches(name, patterns)), "no file of a model")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _code_files(directory: Path, fields: Mapping[str, Any]) -> set[str]:
    """The modules that config.json and the tokenizer's settings name, with those that they import from beside them."""
    waiting = sorted(_named_modules(fields) | _named_modules(_read_json(directory / "tokenizer_config.json")))
    found: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name in found:
            continue
        if not (directory / name).is_file():
            raise PublishError(
                f"{directory} names the code {name}, but it is not there, so nobody could load the model: put it there, or export the model again "
                "with `pesc export MODEL --format remote-code --out DIR`."
            )
        found.add(name)
        waiting += _siblings(directory / name)
    return found


def _named_modules(fields: Mapping[str, Any]) -> set[str]:
    """`modeling_x` of `auto_map: {AutoModel: modeling_x.Model}`; code of another repository (`org/name--modeling_x.Model`) is not here."""
    references: list[Any] = []
    for value in (fields.get("auto_map") or {}).values():
        references += value if isinstance(value, list) else [value]
    return {reference.rpartition(".")[0] for reference in references if isinstance(reference, str) and "--" not in reference}


def _siblings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise PublishError(f"{path} is no Python ({error}), so nobody could load the model: mend it, or export the model again.") from None
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [name for node in imports for name in ([node.module] if node.module else [alias.name for alias in node.names])]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise PublishError(f"{path} is no JSON object ({error}): mend it, or export the model again.") from None
