"""Small inputs of the data stages, and a way to run one builder on them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pesc.stage import BuildResult, Execution, StageContext


def run_stage(build: Any, config: Any, root: Path, inputs: Mapping[str, Path] | None = None, **options: Any) -> tuple[Path, BuildResult]:
    """Run a builder in fresh directories below `root`; returns (out, result)."""
    out, work = root / "out", root / "work"
    out.mkdir(parents=True)
    work.mkdir(parents=True)
    result = build(StageContext("test", config, dict(inputs or {}), out, work, Execution(), **options))
    return out, result


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, str]) -> Path:
    """A wheel that pip accepts, holding `files`."""
    info = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: a-dependency-that-is-nowhere\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in contents.items():
            archive.writestr(member, text)
    return path


def tiny_tokenizer(template: str | None, *, adds_bos: bool = False) -> Any:
    """A byte-level tokenizer whose pad token is its end token, as SmolLM2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog, user and assistant and system"] * 20, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def save_mixture(
    path: Path, conversations: Iterable[list[tuple[str, str]]], held_out: Mapping[str, Iterable[list[tuple[str, str]]]] | None = None
) -> Path:
    """A mix object that holds these conversations, and those of `held_out` by domain."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def turns(rows: Iterable[list[tuple[str, str]]]) -> list[list[dict[str, str]]]:
        return [[{"role": role, "content": content} for role, content in row] for row in rows]

    messages = turns(conversations)
    path.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": [str(i) for i in range(len(messages))], "messages": messages}), path / "mixture.parquet")
    if held_out is not None:
        rows = [
            {"id": f"{domain}{i}", "domain": domain, "messages": row}
            for domain in held_out
            for i, row in enumerate(turns(held_out[domain]))
        ]
        pq.write_table(pa.Table.from_pylist(rows), path / "heldout.parquet")
    return path
