"""`pesc bench` from the command line: small shapes give a table, wrong ones a sentence."""

import subprocess
import sys

import pytest

PESC = [sys.executable, "-m", "pesc.cli", "bench"]


def run(*arguments):
    return subprocess.run([*PESC, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_layer_and_decode_print_their_tables(tmp_path):
    from tests.models.builders import save_dense

    done = run(
        "layer", "--tokens", "32", "--hidden", "32", "--ffn", "64", "--experts", "4", "--dims", "8,16", "--rounds", "1", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["8"] * 4 + ["16"] * 4
    assert "efficiency" in done.stdout
    done = run("decode", str(save_dense(tmp_path / "dense")), "--experts", "4", "--adapter-dim", "8", "--rounds", "1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert "ratio" in done.stdout


@pytest.mark.slow
def test_step_prints_both_arms_and_where_the_time_goes():
    done = run("step", "--quick", "--adapter-dim", "8,16", "--experts", "4", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[2:5]] == [["dense", lines[2].split()[1]], ["PESC", "R=8"], ["PESC", "R=16"]]
    assert "FLOPs alone" in lines[1]
    assert lines[6].split() == ["arm", "attention", "FFN", "bank+router", "CE", "optimizer", "other"]


@pytest.mark.slow
def test_packing_prints_an_arm_a_line():
    done = run("packing", "--quick", "--adapter-dim", "8", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["arm", "packed", "longest", "max_length"]
    assert "tokens/s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("layer", "--top-k", "9"), "--top-k is 9, but there are 8 experts"),
        (("layer", "--dims", "64,x"), "--dims is '64,x': write whole numbers"),
        (("layer", "--dtype", "int8"), "--dtype is 'int8': choose float32 or bfloat16"),
        (("step", "--shape", "9b"), "--shape is '9b': choose one of smollm2-135m, 7b"),
        (("step", "--adapter-dim", "0"), "--adapter-dim is '0': write whole numbers"),
        (("step", "--checkpointing", "some"), "--checkpointing is 'some': choose none, selective or full"),
        (("step", "--model", "/nowhere"), "/nowhere has no config.json"),
        (("packing", "--rows", "rows.jsonl"), "--rows needs --model"),
        (("packing", "--shape", "tiny", "--checkpointing", "some"), "--checkpointing is 'some': choose none, selective or full"),
        (("decode", "--device", "tpu"), "--device is 'tpu': choose cpu or cuda"),
        (("decode", "/nowhere"), "/nowhere has no config.json"),
        (("decode", "--top-k", "9"), "pesc.top_k (9) is larger than pesc.num_experts (8)"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(arguments, sentence):
    done = run(*arguments)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
