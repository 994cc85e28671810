"""The command that serves a model: `pesc serve`.

pesc serve 'demo:merge[pesc]' --python .venv-vllm/bin/python        http://127.0.0.1:8000/v1 until Ctrl-C
pesc serve out/merged --port 9000 --max-model-len 4096 -- --enable-prefix-caching --api-key SECRET

Nothing here imports torch before a command runs.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pesc.settings import store_root, vllm_python


class DType(StrEnum):
    """Type in which the server computes."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("serve")(serve)


def serve(
    model: Annotated[
        str, typer.Argument(help="Directory of a model, or RECIPE:ADDRESS in the store, e.g. 'demo:merge[pesc]'.", metavar="MODEL")
    ],
    extra: Annotated[
        list[str] | None, typer.Argument(help="After --: options of `vllm serve`, as they are.", metavar="[-- OPTION...]")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="What clients call it. Default: the address, or the directory's name.", metavar="NAME"),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Longest prompt with reply, in tokens. Default: the model's own.")
    ] = None,
    dtype: Annotated[DType, typer.Option("--dtype", help="auto: the model's own on a GPU, float32 on a CPU.")] = DType.AUTO,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", min=1, help="GPUs that share each layer.")] = 1,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="chatml, pesc, or a file, instead of the tokenizer's own.", metavar="NAME")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code in a foreign model's directory.")
    ] = False,
    python: Annotated[
        str | None,
        typer.Option("--python", help="Python that has vLLM, or its environment. Default: $PESC_VLLM, or this one.", metavar="PATH"),
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="File for the server's output. Default: one that is kept if the server fails.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the server's output as well.")] = False,
    store: Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")] = None,
) -> None:
    """Serve a model, dense or sparse, through vLLM's OpenAI-compatible server, until Ctrl-C."""
    from pesc.model_argument import find_model
    from pesc.serve.directory import make_served
    from pesc.serve.environment import find_vllm
    from pesc.serve.server import ServerOptions, build_argv, check_options, run_server, termination_as_interrupt

    place = find_model(model, store or store_root(), chat_template)
    name = served_model_name or (model if place.address else Path(os.path.abspath(place.directory)).name)  # a link keeps its name
    options = ServerOptions(host, port, name, max_model_len, str(dtype), tensor_parallel_size, trust_remote_code, tuple(extra or ()))
    check_options(options)
    vllm = find_vllm(python or vllm_python())
    if verbose:
        _show_output()
    log_path = _log_path(log)
    try:
        with termination_as_interrupt(), tempfile.TemporaryDirectory(prefix="pesc-serve-") as room:
            served = make_served(place, Path(room), vllm.cpu, trust_remote_code)
            print(f"Starting vLLM {vllm.version} ({'CPU' if vllm.cpu else 'GPU'}); its log is {log_path}", file=sys.stderr, flush=True)
            argv = build_argv(vllm, served, options)
            run_server(argv, options, Path(room), log_path, os.environ, lambda: _say_ready(options))
    except KeyboardInterrupt:
        pass
    if log is None:
        log_path.unlink(missing_ok=True)
    print("Stopped.", file=sys.stderr)


def _log_path(log: Path | None) -> Path:
    if log is not None:
        return log
    descriptor, path = tempfile.mkstemp(prefix="pesc-serve-", suffix=".log")
    os.close(descriptor)
    return Path(path)


def _say_ready(options) -> None:
    print(f"Serving {options.name} at {options.url}/v1 (Ctrl-C ends it)", flush=True)


def _show_output() -> None:
    """What the supervisor notes of the server's lines, on stderr."""
    logger = logging.getLogger("pesc.launch.supervise")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(logging.StreamHandler(sys.stderr))
