"""Behind vLLM a sparse model gives at least 0.85 of the dense one's tokens a second.

Two servers of one vLLM, asked in turn by 16 clients; each round asks both, in alternating order, and the medians are compared.
"""

import statistics

import pytest

from tests.serve.builders import ask, save_slice, served, vllm_python

ROUNDS, CLIENTS, NEW_TOKENS = 5, 16, 64
BAR = 0.85


@pytest.mark.benchmark
@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_the_sparse_model_reaches_its_share_of_the_dense_ones_tokens(tmp_path, smollm2):
    python, place = vllm_python(), save_slice(smollm2, tmp_path, layers=None)
    options = ("--max-model-len", "1024", "--", "--kv-cache-memory-bytes", str(1 << 30))
    prompts = [f"Tell me about the number {number} and why people like it." for number in range(CLIENTS)]
    speeds: dict[str, list[float]] = {"dense": [], "sparse": []}
    with (
        served(place / "dense", python, *options, log=tmp_path / "dense.log") as dense,
        served(place / "sparse", python, *options, log=tmp_path / "sparse.log") as sparse,
    ):
        urls = {"dense": dense, "sparse": sparse}
        for number in range(ROUNDS + 1):
            for name in ("dense", "sparse") if number % 2 else ("sparse", "dense"):
                request = {"kind": "speed", "prompts": prompts, "tokens": NEW_TOKENS}
                found = ask(python, urls[name], {"requests": [request]}, tmp_path)["results"][0]
                assert found["tokens"] == CLIENTS * NEW_TOKENS
                if number:  # the first round warms up
                    speeds[name].append(found["tokens"] / found["seconds"])
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratio = medians["sparse"] / medians["dense"]
    print(f"dense {medians['dense']:.1f}, sparse {medians['sparse']:.1f} tokens/s, ratio {ratio:.2f}; rounds: {speeds}")
    assert ratio >= BAR
