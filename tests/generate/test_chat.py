"""The conversation: what goes through the template, what each command does, and what a pipe and a terminal get."""

import io

import pytest

from pesc.errors import ModelError
from pesc.generate.chat import HELP, Chat, Screen
from pesc.generate.settings import LoadOptions, Sampling
from pesc.generate.speaker import load_speaker
from pesc.model_argument import find_model
from tests.generate.builders import WITHOUT_SYSTEM, save_speaker

NO_ENDS = {"suppress_tokens": [256, 257, 258]}


def load(directory):
    return load_speaker(find_model(str(directory), directory / "no-store"), LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return load(save_speaker(tmp_path_factory.mktemp("chat") / "dense", generation=NO_ENDS))


@pytest.fixture
def talk(speaker, monkeypatch):
    """A function that has a conversation over a pipe: standard output, notes, conversations put to the template, messages at the end."""

    def run(*lines, system=None, by=speaker, tokens=6):
        put = []
        render = by.tokenizer.apply_chat_template
        out, notes = io.StringIO(), io.StringIO()
        chat = Chat(by, Sampling(tokens), system, Screen(io.StringIO("".join(f"{line}\n" for line in lines)), out, notes))
        with monkeypatch.context() as patch:
            patch.setattr(by.tokenizer, "apply_chat_template", lambda turns, **rest: put.append(list(turns)) or render(turns, **rest))
            chat.run()
        return out.getvalue(), notes.getvalue(), put, chat.messages

    return run


def roles(turns):
    return [turn["role"] for turn in turns]


def test_the_whole_history_goes_through_the_template_once_a_turn(talk):
    out, _, put, messages = talk("One?", "Two?", "Three?", system="Be brief.")
    assert [roles(turns) for turns in put] == [["system", *["user", "assistant"] * turn, "user"] for turn in range(3)]
    said = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    assert out == "".join(f"{text}\n" for text in said), "standard output has the replies and nothing else"
    assert put[2] == messages[:-1]
    assert [turn["content"] for turn in put[2] if turn["role"] == "user"] == ["One?", "Two?", "Three?"]


def test_a_reply_is_what_the_model_says_to_the_same_turns(talk, speaker):
    _, _, _, messages = talk("One?", "Two?")
    assert messages[3]["content"] == speaker.answer(messages[:3], Sampling(6)).text


def test_reset_keeps_the_system_prompt_alone(talk):
    _, _, put, messages = talk("One?", "/reset", "Two?", system="Be brief.")
    assert roles(put[1]) == ["system", "user"]
    assert roles(messages) == ["system", "user", "assistant"]


def test_undo_forgets_one_question_and_its_answer(talk):
    _, notes, put, _ = talk("/undo", "One?", "Two?", "/undo", "Three?")
    assert [turn["content"] for turn in put[2] if turn["role"] == "user"] == ["One?", "Three?"]
    assert "There is nothing to forget." in notes


def test_another_system_prompt_starts_anew(talk):
    _, _, put, messages = talk("One?", "/system Rhyme.", "Two?")
    assert put[-1] == [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Two?"}]
    assert roles(talk("/system", "One?", system="Be brief.")[3]) == ["user", "assistant"]
    assert roles(messages) == ["system", "user", "assistant"]


def test_exit_ends_and_help_helps(talk):
    out, notes, put, _ = talk("/help", "/exit", "One?")
    assert (out, put) == ("", [])
    assert notes == HELP + "\n"
    assert all(command in HELP for command in ("/help", "/reset", "/undo", "/system", "/exit"))


def test_an_unknown_command_is_not_said_to_the_model_but_a_space_says_it(talk):
    _, notes, put, _ = talk("/etc is what?", " /etc is what?")
    assert "There is no command /etc" in notes
    assert [turns[0]["content"] for turns in put] == [" /etc is what?"]


def test_a_message_of_several_lines_is_one_turn(talk):
    _, _, put, _ = talk('"""', "def f():", "", "    return 1", '"""', "", "Two?")
    assert [turns[-1]["content"] for turns in put] == ["def f():\n\n    return 1", "Two?"]


def test_a_conversation_that_fills_the_context_can_go_on_after_a_reset(talk, tmp_path):
    small = load(save_speaker(tmp_path / "small", generation=NO_ENDS, max_position_embeddings=64))
    _, notes, _, messages = talk("x" * 20, "y" * 30, "/reset", "z", by=small)
    assert "but the model was made for 64 with the reply: say less. /undo and /reset make room." in notes
    assert [turn["content"] for turn in messages if turn["role"] == "user"] == ["z"]


def test_a_cut_reply_is_said_to_be_cut(talk):
    assert "(cut off: no more tokens were allowed; --max-new-tokens sets how many)" in talk("One?")[1]


def test_a_template_that_is_missing_or_refuses_is_told_before_the_first_message(talk, tmp_path):
    with pytest.raises(ModelError, match="has no chat template"):
        talk("One?", by=load(save_speaker(tmp_path / "none", template=None)))
    choosy = load(save_speaker(tmp_path / "some", template=WITHOUT_SYSTEM))
    with pytest.raises(ModelError, match="does not take the turns system, user"):
        talk("One?", system="Be brief.", by=choosy)
    _, notes, _, messages = talk("/system Rhyme.", "One?", by=choosy)
    assert "does not take the turns system, user" in notes
    assert roles(messages) == ["user", "assistant"]
