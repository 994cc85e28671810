"""A GGUF model as a plain Hugging Face directory: dequantised once, bf16 safetensors, tokenizer and chat template beside it.

    python -m pesc.data.gguf MODEL.gguf OUT

transformers reads GGUF but refuses to save what it read ("quantized with gguf and is not serializable"), so the weights move
into a fresh model of the same config.  The bytes depend on the GGUF alone: the library's version is left out of the JSON files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

STEPS = 4
_NOT_KEPT = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "torch_dtype", "transformers_version")
_NOISE = {
    "config.json": ("transformers_version",),
    "generation_config.json": ("transformers_version",),
    "tokenizer_config.json": ("transformers_version", "is_local", "local_files_only"),
}
"""What the libraries add about themselves and about this machine."""


def convert(source: Path, out: Path) -> None:
    """Write the model in `source` to the directory `out`.  Raises ValueError when weights are missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": source.name, "local_files_only": True, "trust_remote_code": False}
    _say(1, "reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    _say(2, "dequantising the weights")
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    _say(3, "moving them into a plain model")
    fresh = _fresh_copy(loaded)
    del loaded
    _say(4, "writing safetensors")
    _complete_generation_config(fresh, tokenizer)
    fresh.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    _drop_noise(out)


def _fresh_copy(loaded: Any) -> Any:
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in _NOT_KEPT}
    fresh = type(loaded)(type(loaded.config)(**settings))
    result = fresh.load_state_dict(loaded.state_dict(), strict=False)
    tied = set(getattr(fresh, "_tied_weights_keys", None) or ())
    missing = [key for key in result.missing_keys if key not in tied]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"the GGUF lacks {missing or 'nothing'} and has {result.unexpected_keys or 'nothing'} too much for {type(fresh).__name__}"
        )
    fresh.tie_weights()
    return fresh


def _complete_generation_config(model: Any, tokenizer: Any) -> None:
    generation = model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id


def _drop_noise(out: Path) -> None:
    for name, fields in _NOISE.items():
        path = out / name
        settings = json.loads(path.read_text(encoding="utf-8"))
        for field in fields:
            settings.pop(field, None)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(step: int, message: str) -> None:
    print(f"step {step}/{STEPS}: {message}", flush=True)


def main(arguments: list[str]) -> int:
    """Convert `SOURCE` to `OUT`; exit status 2 for wrong arguments or a GGUF that does not fit."""
    if len(arguments) != 2:
        print("usage: python -m pesc.data.gguf MODEL.gguf OUT", file=sys.stderr)
        return 2
    try:
        convert(Path(arguments[0]), Path(arguments[1]))
    except (ValueError, KeyError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
