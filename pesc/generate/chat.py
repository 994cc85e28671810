"""A conversation: a line in, a reply out as it is made, until the input ends.

On a terminal there are prompts, colours, line editing and a line of figures; elsewhere standard output has the replies and nothing else.
The whole history goes through the chat template once a turn.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console

from pesc.errors import ModelError
from pesc.generate.prompts import Message
from pesc.generate.settings import Sampling
from pesc.generate.speaker import ContextFullError, Reply, Speaker
from pesc.generate.streaming import stop_on_ctrl_c

FENCE = '"""'
HELP = """\
/help          this
/reset         forget the conversation (the system prompt stays)
/undo          forget the last question and its answer
/system TEXT   another system prompt; forgets the conversation
/exit          leave (so does Ctrl-D)
Ctrl-C stops a reply.  A message of several lines stands between lines of \"\"\"."""


class Screen:
    """Where the conversation is read and written."""

    def __init__(self, source: TextIO | None = None, out: TextIO | None = None, notes: TextIO | None = None) -> None:
        self._source, self._out, self._notes = source or sys.stdin, out or sys.stdout, notes or sys.stderr
        self.is_terminal = self._source.isatty() and self._out.isatty()
        self._console = Console(file=self._out, soft_wrap=True, highlight=False)
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing and history for input()

    def read(self, prompt: str) -> str | None:
        """The next line without its end; None at the end of the input."""
        if self.is_terminal:
            try:
                return input(prompt if self._console.no_color else f"\001\033[1;36m\002{prompt}\001\033[0m\002")
            except EOFError:
                self._out.write("\n")
                return None
        line = self._source.readline()
        return line.removesuffix("\n") if line else None

    def write(self, piece: str) -> None:
        """A piece of a reply."""
        self._out.write(piece)
        self._out.flush()

    def note(self, text: str) -> None:
        """What is not said by the model: dim on a terminal, on standard error elsewhere."""
        if self.is_terminal:
            self._console.print(text, style="dim", markup=False)
        else:
            print(text, file=self._notes, flush=True)


class Chat:
    """The conversation and its commands."""

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str | None, screen: Screen) -> None:
        self._speaker, self._sampling, self._screen = speaker, sampling, screen
        self.messages: list[Message] = []
        self._system = system
        self._reset()
        speaker.encode([*self.messages, {"role": "user", "content": "?"}])  # a template that is missing or refuses is told at once

    def run(self) -> None:
        """Talk until the input ends or /exit."""
        if self._screen.is_terminal:
            self._screen.note(f"{self._speaker.place.name} on {self._speaker.model.device}. /help lists the commands, /exit leaves.")
        for said in self._lines():
            if said.startswith("/"):
                if not self._command(said):
                    return
            elif said.strip():
                self._turn(said)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = self._screen.read("> ")
                if line is not None and line.strip() == FENCE:
                    line = self._rest_of_message()
            except KeyboardInterrupt:
                if not self._screen.is_terminal:
                    raise
                self._screen.write("\n")
                self._screen.note("Ctrl-C stops a reply; /exit leaves.")
                continue
            if line is None:
                return
            yield line

    def _rest_of_message(self) -> str:
        lines = []
        while (line := self._screen.read("… ")) is not None and line.strip() != FENCE:
            lines.append(line)
        return "\n".join(lines)

    def _turn(self, said: str) -> None:
        self.messages.append({"role": "user", "content": said})
        try:
            with stop_on_ctrl_c() as stop:
                reply = self._speaker.answer(self.messages, self._sampling, self._screen.write, stop)
        except ModelError as error:
            self.messages.pop()
            self._screen.note(f"{error} /undo and /reset make room." if isinstance(error, ContextFullError) else str(error))
            return
        self.messages.append({"role": "assistant", "content": reply.text})
        self._screen.write("\n")
        self._after(reply)

    def _after(self, reply: Reply) -> None:
        if reply.finish == "interrupted":
            self._screen.note("(stopped; what was said stays in the conversation, /undo forgets it)")
        elif reply.finish == "length":
            self._screen.note("(cut off: no more tokens were allowed; --max-new-tokens sets how many)")
        if self._screen.is_terminal:
            rate = reply.tokens / reply.seconds if reply.seconds else 0.0
            self._screen.note(f"{reply.tokens} tokens, {rate:.1f} a second; {reply.prompt_tokens + reply.tokens} in the conversation\n")

    def _command(self, line: str) -> bool:
        """Do what a line with a slash says; False to leave."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            self._screen.note(HELP)
        elif name == "/reset":
            self._reset()
            self._screen.note("(forgotten)")
        elif name == "/undo":
            self._undo()
        elif name == "/system":
            self._change_system(rest.strip() or None)
        else:
            self._screen.note(f"There is no command {name}: /help lists them. To say it to the model, put a space before it.")
        return True

    def _reset(self) -> None:
        self.messages[:] = [{"role": "system", "content": self._system}] if self._system else []

    def _undo(self) -> None:
        if self.messages[-1:] and self.messages[-1]["role"] == "assistant":
            del self.messages[-2:]
            self._screen.note("(forgotten: the last question and its answer)")
        else:
            self._screen.note("There is nothing to forget.")

    def _change_system(self, text: str | None) -> None:
        before, self._system = self._system, text
        self._reset()
        try:
            self._speaker.encode([*self.messages, {"role": "user", "content": "?"}])
        except ModelError as error:
            self._system = before
            self._reset()
            self._screen.note(str(error))
            return
        self._screen.note("(forgotten; the system prompt is " + (f"now: {text})" if text else "gone)"))
