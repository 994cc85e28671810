"""A model behind an OpenAI-compatible server: `pesc serve MODEL`.

    pesc serve 'demo:merge[pesc]' --python .venv-vllm/bin/python
    curl http://127.0.0.1:8000/v1/completions -d '{"model": "demo:merge[pesc]", "prompt": "The sky", "max_tokens": 20}' \
        -H 'Content-Type: application/json'

The server is vLLM, in an environment of its own: it pins a transformers that may differ from this project's, and needs nothing of this
package.  A dense model is served as it is.  A sparse one is served as the stand-alone directory that `pesc export --format remote-code` writes,
made for the time of the server out of links, through vLLM's Transformers backend.

Why that way and not by a plugin of our own classes: vLLM's backend rewrites the model in the same way as its own ones (q, k and v merged, gate and
up merged, its norms and attention), and measured on one machine the dense model runs no slower through it than through vLLM's own
Llama (tests/benchmarks/RESULTS.md).  A plugin would gain nothing, and would have to be installed beside vLLM and follow its classes.

Map: environment (which Python has vLLM), directory (what vLLM is given), server (the command, its life and its end), background (a server for
the process that asks it, such as a benchmark's), commands (the command line).

Promises
- Nothing outlives `pesc serve`: the server dies with it, whatever kills it; links and generated code live in a temporary directory.
- Ctrl-C and SIGTERM end it cleanly, with exit code 0.
- The experts are there: tensors are checked against config.json before vLLM starts.

Never: runs code of a model directory unless `--trust-remote-code` is given (the code of a sparse model is made here); sends usage statistics.

Pitfall: on a GPU vLLM compiles and captures graphs, where nothing can be measured and nothing may wait for the device; so the adapters run as
`dense` there, all experts in two matrix products, whatever config.json pins; on a CPU it runs eagerly, with `auto`.
"""
