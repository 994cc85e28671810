"""The commands that use a model: `pesc generate` and `pesc chat`.

pesc generate out/merged "Why is the sky blue?"                 one answer, as it is made
pesc generate 'demo:merge[pesc]' --file prompts.jsonl           an answer a row, as JSON lines
pesc chat out/merged --system "Answer in one sentence." --four-bit
echo "Why is the sky blue?" | pesc chat out/merged              replies alone on standard output

Nothing here imports torch before a command runs.
"""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pesc.errors import CancelledError, DataError, ModelError
from pesc.generate.settings import LoadOptions, Sampling
from pesc.models.placement import Device
from pesc.settings import store_root

if TYPE_CHECKING:
    from pesc.generate.prompts import Message, PromptRow
    from pesc.generate.speaker import Reply, Speaker


class DType(StrEnum):
    """Type of the weights in memory."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Model = Annotated[
    str, typer.Argument(help="Directory of a model, or RECIPE:ADDRESS in the store, e.g. 'demo:merge[pesc]'.", metavar="MODEL")
]
System = Annotated[str | None, typer.Option("--system", help="System prompt.", metavar="TEXT")]
Template = Annotated[
    str | None, typer.Option("--chat-template", help="chatml, pesc, or a file, instead of the tokenizer's own.", metavar="NAME")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: a GPU where there is one.")]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="auto: the model's own on a GPU, float32 on a CPU.")]
FourBit = Annotated[bool, typer.Option("--four-bit", help="Hold the weights in NF4, as in QLoRA training.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Longest reply. Default: the model's generation config, or 512.")
]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0, help="0: always the likeliest token.")]
TopP = Annotated[float | None, typer.Option("--top-p", min=0, max=1, help="Draw from the likeliest tokens of this share.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Draw from so many tokens; 0: from all.")]
Penalty = Annotated[float | None, typer.Option("--repetition-penalty", min=0.01, help="Above 1: repeat less.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token, whatever the generation config says.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of each reply's draws. Default: other ones each time.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code in a foreign model's directory.")]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("generate")(generate)
    app.command("chat")(chat)


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="Default: standard input, as one prompt.", metavar="[PROMPT]")] = None,
    file: Annotated[
        str | None, typer.Option("--file", help="JSON lines with `prompt` or `messages`; - is standard input.", metavar="FILE")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")] = False,
    system: System = None,
    chat_template: Template = None,
    device: DeviceOption = Device.AUTO,
    dtype: DTypeOption = DType.AUTO,
    four_bit: FourBit = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    greedy: Greedy = False,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    store: StoreOption = None,
) -> None:
    """Answer one prompt (printed as it is made), or each row of a file (JSON lines).

    A prompt is put as the user's turn through the chat template where the tokenizer has one, and continued as it is where it has none.
    """
    from pesc.model_argument import find_model

    if prompt is not None and file is not None:
        raise DataError("PROMPT and --file are both given: one of them.")
    if raw and (system or chat_template):
        raise DataError("--raw goes without a chat template: leave out --system and --chat-template.")
    place = find_model(model, store or store_root(), chat_template)
    rows = _rows(prompt, file)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, greedy, seed)
    from pesc.generate.speaker import load_speaker

    try:
        speaker = load_speaker(place, LoadOptions(str(device), str(dtype), four_bit, trust_remote_code))
        if file is None:
            _answer_one(speaker, _content(speaker, rows[0].content, raw, system), sampling)
        else:
            _answer_rows(speaker, rows, file, raw, system, sampling)
    except KeyboardInterrupt:
        raise CancelledError("Interrupted.") from None


def _rows(prompt: str | None, file: str | None) -> list[PromptRow]:
    from pesc.generate.prompts import PromptRow, read_prompts

    if file is not None:
        return read_prompts(file)
    if prompt is None:
        if sys.stdin.isatty():
            raise DataError("There is no prompt: give PROMPT, --file FILE, or a text on standard input.")
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise DataError("The prompt is empty: write something.")
    return [PromptRow(1, {"prompt": prompt})]


def _content(speaker: Speaker, content: str | list[Message], raw: bool, system: str | None) -> str | list[Message]:
    """What is put to the model: a text as it is, or a conversation.  A conversation's own system prompt goes before --system."""
    if isinstance(content, str):
        if raw or not (speaker.has_template or system):
            return content
        content = [{"role": "user", "content": content}]
    if system and content[0]["role"] != "system":
        content = [{"role": "system", "content": system}, *content]
    return content


def _answer_one(speaker: Speaker, content: str | list[Message], sampling: Sampling) -> None:
    speaker.answer(content, sampling, on_text=lambda piece: print(piece, end="", flush=True))
    print()


def _answer_rows(speaker: Speaker, rows: list[PromptRow], file: str, raw: bool, system: str | None, sampling: Sampling) -> None:
    from pesc.console import progress_bar

    with progress_bar("generate") as progress:
        for done, row in enumerate(rows, 1):
            try:
                reply = speaker.answer(_content(speaker, row.content, raw, system), sampling)
            except ModelError as error:
                raise DataError(f"{'standard input' if file == '-' else file}, row {row.number}: {error}") from error
            print(json.dumps({**row.fields, **_as_fields(reply)}, ensure_ascii=False), flush=True)
            progress(done, len(rows), unit="prompts")


def _as_fields(reply: Reply) -> dict[str, str | int]:
    return {"text": reply.text, "finish": reply.finish, "prompt_tokens": reply.prompt_tokens, "tokens": reply.tokens}


def chat(
    model: Model,
    system: System = None,
    chat_template: Template = None,
    device: DeviceOption = Device.AUTO,
    dtype: DTypeOption = DType.AUTO,
    four_bit: FourBit = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    greedy: Greedy = False,
    seed: Seed = None,
    trust_remote_code: Trust = False,
    store: StoreOption = None,
) -> None:
    """Talk with a model.  /help lists the commands; Ctrl-C stops a reply.  A pipe works too: a message a line, replies alone on stdout."""
    from pesc.model_argument import find_model

    place = find_model(model, store or store_root(), chat_template)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, greedy, seed)
    from pesc.generate.chat import Chat, Screen
    from pesc.generate.speaker import load_speaker

    try:
        speaker = load_speaker(place, LoadOptions(str(device), str(dtype), four_bit, trust_remote_code))
        Chat(speaker, sampling, system, Screen()).run()
    except KeyboardInterrupt:
        raise CancelledError("Interrupted.") from None
