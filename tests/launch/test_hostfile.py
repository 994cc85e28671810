"""`pesc launch` with a stand-in for ssh that runs the command here."""

from __future__ import annotations

import time

import pytest

from pesc.cli import app
from pesc.errors import RecipeError, StageFailedError
from pesc.launch.hostfile import Machine, read_hostfile, run_everywhere, settings_for
from tests.launch.test_supervise import alive

SSH = "sh -c 'HERE=$0 exec sh -c \"$1\"'"  # as ssh does: the first argument is the machine, the second a line for its shell
MACHINES = [Machine("node0", 2), Machine("node1", 2)]


def test_deepspeeds_format_is_read(tmp_path):
    (tmp_path / "hosts").write_text("# ours\nnode0 slots=2\n\nnode1  slots=2  # the new one\n")
    assert read_hostfile(tmp_path / "hosts") == MACHINES
    from deepspeed.launcher.runner import fetch_hostfile

    (tmp_path / "hosts").write_text("# ours\nnode0 slots=2\n\nnode1  slots=2\n")
    assert dict(fetch_hostfile(str(tmp_path / "hosts"))) == {machine.name: machine.slots for machine in MACHINES}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("node0 slots=two\n", "line 1: 'node0 slots=two' is not NAME slots=N"),
        ("# nobody\n", "names no machine"),
        ("a slots=1\na slots=1\n", "names a machine twice"),
        ("a slots=1\nb slots=2\n", "different slots"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_sentence(tmp_path, text, sentence):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        read_hostfile(tmp_path / "hosts")


def test_all_machines_get_the_same_settings():
    assert settings_for(MACHINES, 1234) == ["execution.num_nodes=2", "execution.master=node0:1234", "execution.num_processes=2"]
    assert settings_for(MACHINES[:1]) == ["execution.num_processes=2"]


def test_each_machine_runs_the_command_and_its_lines_carry_its_name():
    said = []
    run_everywhere(MACHINES, ["sh", "-c", "echo I am $HERE; echo 'two  words'"], SSH, said.append)
    assert sorted(said) == ["node0: I am node0", "node0: two  words", "node1: I am node1", "node1: two  words"]


def test_when_one_fails_all_are_ended(tmp_path):
    program = f"echo $$ > {tmp_path}/$HERE; while [ $HERE = node1 -a ! -e {tmp_path}/node0 ]; do sleep 0.1; done; [ $HERE = node0 ] || exit 7; sleep 600"
    started = time.monotonic()
    with pytest.raises(StageFailedError, match="The command on node1 ended with exit status 7; the others were ended"):
        run_everywhere(MACHINES, ["sh", "-c", program], SSH, lambda _line: None)
    assert time.monotonic() - started < 60
    assert not alive(int((tmp_path / "node0").read_text()))


def test_the_command_line_starts_pesc_run_on_each(tmp_path, capfd):
    (tmp_path / "hosts").write_text("node0 slots=2\nnode1 slots=2\n")
    app(
        ["launch", "demo", "train.seed=1", "--hostfile", str(tmp_path / "hosts"), "--ssh", SSH, "--command", "echo pesc"],
        standalone_mode=False,
    )
    settings = "execution.num_nodes=2 execution.master=node0:29500 execution.num_processes=2"
    expected = [f"{name}: pesc run demo train.seed=1 {settings} --until train" for name in ("node0", "node1")]
    assert sorted(capfd.readouterr().out.splitlines()) == expected
