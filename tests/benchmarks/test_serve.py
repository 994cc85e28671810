"""Behind vLLM a sparse model gives at least 0.85 of the dense one's tokens a second.

One server at a time, each twice (dense, sparse, sparse, dense), asked by 16 clients; the medians over all rounds are compared.
"""

import statistics

import pytest

from tests.serve.builders import ask, save_slice, served, vllm_python

ROUNDS, CLIENTS, NEW_TOKENS = 4, 16, 64
BAR = 0.85


@pytest.mark.benchmark
@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_the_sparse_model_reaches_its_share_of_the_dense_ones_tokens(tmp_path, smollm2):
    python, place = vllm_python(), save_slice(smollm2, tmp_path, layers=None)
    options = ("--max-model-len", "1024", "--", "--kv-cache-memory-bytes", str(1 << 30))
    prompts = [f"Tell me about the number {number} and why people like it." for number in range(CLIENTS)]
    request = {"kind": "speed", "prompts": prompts, "tokens": NEW_TOKENS}
    speeds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for turn, name in enumerate(("dense", "sparse", "sparse", "dense")):
        with served(place / name, python, *options, log=tmp_path / f"{name}-{turn}.log") as url:
            for number in range(ROUNDS + 1):
                found = ask(python, url, {"requests": [request]}, tmp_path)["results"][0]
                assert found["tokens"] == CLIENTS * NEW_TOKENS
                if number:  # the first round warms up
                    speeds[name].append(found["tokens"] / found["seconds"])
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratio = medians["sparse"] / medians["dense"]
    print(f"dense {medians['dense']:.1f}, sparse {medians['sparse']:.1f} tokens/s, ratio {ratio:.2f}; rounds: {speeds}")
    assert ratio >= BAR
