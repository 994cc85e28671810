"""The experts that a model chooses inside vLLM, for every token and layer.

python routing_program.py SERVED_DIR ROWS.json CHOICES.json        (by vLLM's Python; rows are lists of token ids)
"""

import json
import os
import sys
from pathlib import Path

from routing_hooks import collect, install

os.environ.update(VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")


def main(directory, rows_path, out):
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory, dtype="float32", max_model_len=1024, enforce_eager=True, trust_remote_code=True, kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )  # fmt: skip
    llm.apply_model(install)
    choices = []
    for row in json.loads(Path(rows_path).read_text()):
        llm.generate({"prompt_token_ids": row}, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        choices.append(llm.apply_model(collect)[0])
    Path(out).write_text(json.dumps(choices))


if __name__ == "__main__":
    main(*sys.argv[1:])
