"""`pesc generate` and `pesc chat` as a user meets them: by exit code and by what is printed; on a terminal, with a real Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from pesc import cli
from tests.generate.builders import save_speaker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_speaker(tmp_path_factory.mktemp("commands") / "dense", generation={"suppress_tokens": [256, 257, 258]})


@pytest.fixture
def pesc(monkeypatch, capsys):
    """A function that runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["pesc", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_a_prompt_is_a_users_turn_unless_it_is_raw(pesc, directory):
    said = pesc("generate", directory, "Why?", "--max-new-tokens", 9)
    assert (said[0], said[2]) == (0, "")
    assert pesc("generate", directory, "--max-new-tokens", 9, stdin="Why?\n") == said
    assert pesc("generate", directory, "user: Why?</s>\nassistant: ", "--raw", "--max-new-tokens", 9) == said
    assert pesc("generate", directory, "Why?", "--raw", "--max-new-tokens", 9)[1] != said[1]
    assert pesc("generate", directory, "Why?", "--system", "Be brief.", "--max-new-tokens", 9)[1] != said[1]


def test_a_model_without_template_continues_the_prompt(pesc, directory, tmp_path):
    plain = save_speaker(tmp_path / "plain", template=None, generation={"suppress_tokens": [256, 257, 258]})
    assert pesc("generate", plain, "Why?", "--max-new-tokens", 9) == pesc("generate", directory, "Why?", "--raw", "--max-new-tokens", 9)


def test_a_file_gives_a_line_a_row_with_its_own_fields(pesc, directory, tmp_path):
    rows = [{"prompt": "Why?", "id": 1}, {"messages": [{"role": "user", "content": "Why?"}], "id": 2}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "p.jsonl").write_text(text)
    code, out, _ = pesc("generate", directory, "--file", tmp_path / "p.jsonl", "--max-new-tokens", 9)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [{name: answer[name] for name in row} for answer, row in zip(answers, rows, strict=True)] == rows
    assert answers[0]["text"] + "\n" == answers[1]["text"] + "\n" == pesc("generate", directory, "Why?", "--max-new-tokens", 9)[1]
    assert (answers[0]["tokens"], answers[0]["finish"]) == (9, "length")
    assert pesc("generate", directory, "--file", "-", "--max-new-tokens", 9, stdin=text)[1] == out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "none", "x"], "There is no directory none"),
        (["chat", "none"], "There is no directory none"),
        (["generate", "MODEL", "x", "--file", "y"], "PROMPT and --file are both given"),
        (["generate", "MODEL", "x", "--raw", "--system", "y"], "--raw goes without a chat template"),
        (["generate", "MODEL"], "The prompt is empty"),
        (["generate", "MODEL", "--file", "none.jsonl"], "none.jsonl cannot be read"),
        (["generate", "MODEL", "x" * 600], "but the model was made for 512"),
        (["generate", "MODEL", "--file", "-"], "standard input has no rows"),
    ],
)
def test_a_mistake_is_one_sentence(pesc, directory, arguments, message):
    code, out, err = pesc(*[str(directory) if argument == "MODEL" else argument for argument in arguments])
    assert (code, out.strip()) == (1, "")
    assert err.startswith("pesc: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_row_that_cannot_be_answered_is_named_and_the_answers_before_it_stay(pesc, directory):
    rows = '{"prompt": "a"}\n' + json.dumps({"prompt": "x" * 600})
    code, out, err = pesc("generate", directory, "--file", "-", "--max-new-tokens", 2, stdin=rows)
    assert (code, out.count("\n")) == (1, 1)
    assert err.splitlines()[-1].startswith("pesc: standard input, row 2: The prompt has ")


def test_options_out_of_range_are_wrong_usage(pesc, directory):
    for option in (["--top-p", "1.5"], ["--max-new-tokens", "0"], ["--temperature", "-1"], ["--device", "tpu"]):
        assert pesc("generate", directory, "x", *option)[0] == 2


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *arguments):
        master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
        command = [sys.executable, "-m", "pesc.cli", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(slave)
        self._master, self.seen = master, ""

    def type(self, text):
        os.write(self._master, text.encode())

    def wait_for(self, pattern, seconds=90):
        """What came up to and with the first match."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.seen!r}"
            self._read(1.0)
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def press_ctrl_c_until(self, pattern):
        """As a user does it who sees nothing happen: CPython's readline misses a signal that comes between two of its waits for a key."""
        for _ in range(20):
            self.type("\x03")
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                if re.search(pattern, self.seen):
                    return self.wait_for(pattern)
                self._read(0.2)
        raise AssertionError(f"no {pattern!r} in {self.seen!r}")

    def _read(self, seconds):
        if select.select([self._master], [], [], seconds)[0]:
            try:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the program has gone
                assert self.process.poll() is None, f"it ended with {self.process.returncode}: {self.seen!r}"

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _own_terminal():
    """Make the terminal the one whose Ctrl-C this program gets."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def terminal():
    opened = []

    def start(*arguments):
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


PROMPT = r"> \x01?\x1b\[0m\x02?"


@pytest.mark.slow
def test_a_chat_on_a_terminal_with_ctrl_c_in_a_reply_and_at_the_prompt(terminal, tmp_path):
    """The key itself is pressed: the terminal makes the signal of it."""
    endless = save_speaker(tmp_path / "endless", generation={"suppress_tokens": [256, 257, 258]}, max_position_embeddings=1_000_000)
    chat = terminal("chat", endless, "--max-new-tokens", "900000", "--device", "cpu")
    assert f"{endless} on cpu. /help lists the commands" in chat.wait_for(PROMPT)
    chat.type("Why?\n")
    chat.wait_for(r"Why\?\r?\n[\s\S]{20,}")  # some of the reply
    chat.type("\x03")
    stopped = chat.wait_for(PROMPT, 20)
    assert "(stopped; what was said stays in the conversation, /undo forgets it)" in stopped
    assert re.search(r"\d+ tokens, [\d.]+ a second; \d+ in the conversation", stopped)
    chat.type("half a message")
    chat.wait_for("half a message", 20)  # readline listens
    chat.press_ctrl_c_until(r"Ctrl-C stops a reply; /exit leaves\.[\s\S]*?" + PROMPT)
    chat.type("/undo\n")
    chat.wait_for(r"\(forgotten: the last question and its answer\)[\s\S]*?" + PROMPT, 20)
    chat.type("\x04")
    assert chat.process.wait(20) == 0


@pytest.mark.slow
def test_a_chat_on_a_pipe_goes_on_after_a_real_sigint_in_a_reply(tmp_path):
    line_end = sorted(pre_tokenizers.ByteLevel.alphabet()).index("Ċ")
    endless = save_speaker(
        tmp_path / "endless", generation={"suppress_tokens": [256, 257, 258, line_end]}, max_position_embeddings=1_000_000
    )
    command = [sys.executable, "-m", "pesc.cli", "chat", str(endless), "--max-new-tokens", "900000", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    for question in (b"One?\n", b"Two?\n"):
        process.stdin.write(question)
        process.stdin.flush()
        first = process.stdout.read(1)  # a reply has begun
        process.send_signal(signal.SIGINT)
        reply = first + process.stdout.readline()
        assert len(reply) > 1
        assert reply.endswith(b"\n")
        assert b"\x1b[" not in reply
        assert process.stderr.readline() == b"(stopped; what was said stays in the conversation, /undo forgets it)\n"
    out, err = process.communicate(timeout=60)  # the end of the input
    assert (process.returncode, out, err) == (0, b"", b"")
