"""`pesc upcycle`, `import` and `export` at the command line: one sentence for what is wrong, and nothing left behind."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pesc import cli
from tests.models.builders import save_dense, save_published

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--num-experts", "4", "--adapter-dim", "8"]


@pytest.fixture
def pesc(monkeypatch, capsys):
    """A function that runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pesc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def refuses(pesc, tmp_path):
    """A function that expects one sentence, exit code 1, and a directory as it was."""

    def run(message, *arguments):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = pesc(*arguments)
        assert (code, out) == (1, ""), err
        assert err.startswith("pesc: ")
        assert err.count("\n") == 1, err
        assert message in err
        assert sorted(tmp_path.rglob("*")) == before

    return run


def test_the_whole_way_round(pesc, tmp_path):
    save_dense(tmp_path / "dense")
    code, out, _ = pesc("upcycle", tmp_path / "dense", "--out", tmp_path / "new/sparse", *SMALL)
    assert code == 0
    numbers = {line[:18].strip(): int(line[18:37].replace(",", "")) for line in out.splitlines()[:4]}
    dense = sum(tensor.numel() for tensor in load_file(tmp_path / "dense/model.safetensors").values())
    bank = 2 * (2 * 4 * 8 * 32 + 4 * 32)
    assert numbers == {
        "dense parameters": dense,
        "added parameters": bank,
        "total parameters": dense + bank,
        "active parameters": dense + bank - 2 * 2 * 2 * 8 * 32,
    }
    assert "(2 of 4 experts)" in out
    assert out.splitlines()[-1] == str(tmp_path / "new/sparse")
    assert os.path.samefile(tmp_path / "dense/model.safetensors", tmp_path / "new/sparse/model-00001-of-00001.safetensors")
    assert json.loads((tmp_path / "new/sparse/config.json").read_text())["pesc"]["top_k"] == 2
    for name in ("camelidae", "remote-code"):
        assert pesc("export", tmp_path / "new/sparse", "--format", name, "--out", tmp_path / name)[:2] == (0, f"{tmp_path / name}\n")
    code, out, _ = pesc("import", tmp_path / "camelidae", "--out", tmp_path / "again")
    assert code == 0
    assert f"{dense + bank:,}" in out
    assert not list(tmp_path.glob(".*"))


def spoil_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


UPCYCLES = {
    "no config.json": (lambda d: (d / "config.json").unlink(), (), "has no config.json"),
    "no model": (lambda d: [path.unlink() for path in d.iterdir()], (), "has no config.json"),
    "config.json without layers": (lambda d: spoil_json(d / "config.json", num_hidden_layers=None), (), "does not say num_hidden_layers"),
    "config.json with nonsense": (lambda d: spoil_json(d / "config.json", vocab_size="many"), (), "does not describe a model"),
    "another architecture": (lambda d: spoil_json(d / "config.json", model_type="mamba"), (), "mamba"),
    "top_k too large": (lambda d: None, ("--top-k", "5"), "top_k (5) is larger than num_experts (4)"),
    "no experts": (lambda d: None, ("--num-experts", "0"), "--num-experts 0: "),
    "an unknown dtype": (lambda d: None, ("--dtype", "int8"), "--dtype int8: "),
    "a scaling of zero": (lambda d: None, ("--scaling", "0"), "--scaling 0.0: "),
    "a truncated shard": (lambda d: os.truncate(d / "model.safetensors", 999), (), "not a whole safetensors file"),
    "an extra tensor": (
        lambda d: save_file(load_file(d / "model.safetensors") | {"model.vision.weight": torch.ones(2)}, d / "model.safetensors"),
        (),
        "model.vision.weight, which a pesc_llama of this config.json does not have",
    ),
}


@pytest.mark.parametrize("case", UPCYCLES)
def test_what_cannot_be_upcycled_is_one_sentence(refuses, tmp_path, case):
    spoil, options, message = UPCYCLES[case]
    save_dense(tmp_path / "dense")
    spoil(tmp_path / "dense")
    refuses(message, "upcycle", tmp_path / "dense", "--out", tmp_path / "made/out", *SMALL, *options)


@pytest.mark.parametrize("command", ["upcycle", "import", "export"])
def test_a_directory_in_use_is_left_alone(refuses, tmp_path, command):
    if command == "upcycle":
        save_dense(tmp_path / "model")
    else:
        save_published(tmp_path / "model", "llama", "expert_{}", "camelidae")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").write_text("x")
    options = ["--format", "camelidae"] if command == "export" else []
    refuses("is not empty", command, tmp_path / "model", "--out", tmp_path / "out", *options)


EXPERT = "model.layers.1.mlp.moe_adapter.experts.expert_3.adapter_up.weight"
IMPORTS = {
    "a lost expert": (lambda t: t.pop(EXPERT), "experts [0, 1, 2] in model.layers.1.mlp.adapters.up"),
    "a lost dense tensor": (lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
    "a wrong shape": (lambda t: t.update({EXPERT: torch.ones(32, 7)}), "expert_3.adapter_up.weight as F32 [32, 7]"),
    "an extra tensor": (lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(2)}), "model.layers.1.mlp.gate.weight, which a"),
    "an expert too many": (lambda t: t.update({EXPERT.replace("_3", "_4"): t[EXPERT].clone()}), "experts [0, 1, 2, 3, 4] in"),
}


@pytest.mark.parametrize("case", IMPORTS)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_a_checkpoint_that_is_not_whole_is_one_sentence(refuses, tmp_path, case, pickled):
    change, message = IMPORTS[case]
    save_published(tmp_path / "model", "llama", "expert_{}", "camelidae", moe_scaling=0.25)
    tensors = load_file(tmp_path / "model/model.safetensors")
    change(tensors)
    if pickled:
        (tmp_path / "model/model.safetensors").unlink()
        torch.save(tensors, tmp_path / "model/pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model/model.safetensors")
    refuses(message, "import", tmp_path / "model", "--out", tmp_path / "out")


def test_a_truncated_pickle_and_impossible_settings_are_one_sentence(refuses, tmp_path):
    save_published(tmp_path / "model", "llama", "expert_{}", "camelidae")
    spoil_json(tmp_path / "model/config.json", topk=9)
    refuses("pesc.top_k (9) is larger than pesc.num_experts (4)", "import", tmp_path / "model", "--out", tmp_path / "out")
    torch.save(load_file(tmp_path / "model/model.safetensors"), tmp_path / "model/pytorch_model.bin")
    (tmp_path / "model/model.safetensors").unlink()
    os.truncate(tmp_path / "model/pytorch_model.bin", 5000)
    spoil_json(tmp_path / "model/config.json", topk=2)
    refuses("is not a plain file of tensors", "import", tmp_path / "model", "--out", tmp_path / "out")


def test_what_needs_no_import_or_another_command_hears_it(refuses, tmp_path):
    save_dense(tmp_path / "dense")
    refuses("a dense model becomes sparse with `pesc upcycle`", "import", tmp_path / "dense", "--out", tmp_path / "out")
    save_published(tmp_path / "theirs", "llama", "expert_{}", "camelidae")
    refuses("`pesc import", "upcycle", tmp_path / "theirs", "--out", tmp_path / "out")
    refuses("leave out --base", "import", tmp_path / "theirs", "--top-k", "2", "--out", tmp_path / "out")


def test_a_training_checkpoint_must_be_told_what_it_does_not_hold(refuses, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    torch.save({}, tmp_path / "checkpoint-1/moe_model.bin")
    refuses("give --base, --top-k, --scaling (that code's training", "import", tmp_path / "checkpoint-1", "--out", tmp_path / "out")
    options = ["--base", tmp_path / "dense", "--scaling", "1"]
    refuses("give --top-k (that code's training", "import", tmp_path / "checkpoint-1", *options, "--out", tmp_path / "out")


def test_unknown_formats_are_one_sentence(refuses, tmp_path):
    refuses("it must be one of camelidae, sparsetral, remote-code", "export", tmp_path, "--format", "onnx", "--out", tmp_path / "out")
    save_dense(tmp_path / "dense")
    refuses("There is no GGUF of a sparse model: llama.cpp has no", "export", tmp_path, "--format", "gguf", "--out", tmp_path / "out")
    refuses("needs no export", "export", tmp_path / "dense", "--format", "remote-code", "--out", tmp_path / "out")
    refuses("is a dense llama model", "export", tmp_path / "dense", "--format", "camelidae", "--out", tmp_path / "out")


@pytest.mark.parametrize("command", ["upcycle", "import", "export"])
def test_a_full_disk_is_one_sentence(refuses, pesc, tmp_path, monkeypatch, command):
    """The disk fills in the middle of the weights."""
    save_dense(tmp_path / "dense")
    save_published(tmp_path / "theirs", "llama", "expert_{}", "camelidae")
    assert pesc("import", tmp_path / "theirs", "--out", tmp_path / "ours")[0] == 0

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pesc.models.tensor_files._raw", full)
    monkeypatch.setattr(torch, "save", full)
    source, *options = {"upcycle": ["dense", *SMALL], "import": ["theirs"], "export": ["ours", "--format", "camelidae"]}[command]
    refuses("is full, so nothing was written", command, tmp_path / source, "--out", tmp_path / "a/b", *options)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path):
    save_dense(tmp_path / "dense")
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "pesc.cli", "upcycle", str(tmp_path / "dense"), "--out", str(tmp_path / "out")]
    options = ["--num-experts", "64", "--adapter-dim", "65536"]  # 1.6 GB: some seconds
    process = subprocess.Popen([*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.*/bank.safetensors")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == f"pesc: Interrupted: nothing was written to {tmp_path / 'out'}."
    assert sorted(tmp_path.rglob("*")) == before
