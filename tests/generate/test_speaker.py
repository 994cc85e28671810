"""What is said is what transformers' own `generate` says; what is streamed is that text, piece by piece."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TextStreamer

import pesc.models
from pesc.errors import ModelError
from pesc.generate.settings import LoadOptions, Sampling
from pesc.generate.speaker import ContextFullError, load_speaker
from pesc.generate.streaming import PieceStreamer, Stop
from pesc.model_argument import find_model
from pesc.models.export import export_remote_code
from pesc.models.upcycle import upcycle_directory
from tests.generate.builders import TEMPLATE, WITHOUT_SYSTEM, change_json, save_speaker
from tests.models.builders import UPCYCLE

pesc.models.register()
CPU = LoadOptions(device="cpu")
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Rayleigh."},
    {"role": "user", "content": "And at dusk?"},
]


def load(directory, template=None, options=CPU):
    return load_speaker(find_model(str(directory), directory / "no-store", template), options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_speaker(tmp_path_factory.mktemp("speaker") / "dense", generation={"temperature": 0.9, "top_k": 20, "do_sample": False})


@pytest.fixture(scope="module")
def speaker(directory):
    return load(directory)


def transformers_says(directory, inputs, seed=None, **options):
    """The text by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    encoded = (
        tokenizer(inputs, return_tensors="pt")
        if isinstance(inputs, str)
        else tokenizer.apply_chat_template(inputs, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    )
    if seed is not None:
        torch.manual_seed(seed)
    ids = model.generate(**encoded, **options)[0, encoded["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


@pytest.mark.parametrize("content", ["Once upon a time", TURNS], ids=["text", "turns"])
@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({}, {"do_sample": False}),
        ({"greedy": True, "temperature": 2.0}, {"do_sample": False}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.7, "seed": 3}, {"do_sample": True, "temperature": 0.7, "top_k": 20}),
        ({"top_p": 0.8, "top_k": 0, "seed": 4}, {"do_sample": True, "top_p": 0.8, "top_k": 0, "temperature": 0.9}),
        ({"repetition_penalty": 1.3}, {"do_sample": False, "repetition_penalty": 1.3}),
    ],
)
def test_the_text_is_that_of_transformers_generate(speaker, directory, content, sampling, options):
    reply = speaker.answer(content, Sampling(max_new_tokens=40, **sampling))
    assert (reply.text, reply.tokens) == transformers_says(directory, content, sampling.get("seed"), max_new_tokens=40, **options)
    assert len(reply.text) > 5


def test_a_seed_repeats_a_reply_and_no_seed_does_not(speaker):
    drawn = [speaker.answer("Say", Sampling(max_new_tokens=30, temperature=1.5, seed=seed)).text for seed in (1, 1, 2, None, None)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("form", ["sparse", "remote-code"])
def test_sparse_models_answer_right_after_upcycling_as_the_dense_one_does(speaker, directory, tmp_path, form):
    (tmp_path / "sparse").mkdir()
    upcycle_directory(directory, tmp_path / "sparse", UPCYCLE)
    if form == "remote-code":
        (tmp_path / "remote-code").mkdir()
        export_remote_code(tmp_path / "sparse", tmp_path / "remote-code")
    sparse = load(tmp_path / form)
    assert type(sparse.model).__name__ == "PescLlamaForCausalLM"
    assert type(sparse.model).__module__.startswith("pesc."), "no code of the directory is run"
    assert sparse.answer(TURNS, Sampling(40)).text == speaker.answer(TURNS, Sampling(40)).text


def test_four_bit_weights_are_held_in_four_bit_and_answer(tmp_path):
    from bitsandbytes.nn import Linear4bit

    wide = save_speaker(tmp_path / "wide", hidden_size=64, intermediate_size=128)  # what bitsandbytes needs on CPUs with bf16 instructions
    speaker = load(wide, options=LoadOptions(device="cpu", four_bit=True))
    assert isinstance(speaker.model.model.layers[0].mlp.down_proj, Linear4bit)
    assert speaker.answer(TURNS, Sampling(8)).tokens > 0


def test_pieces_come_while_the_reply_is_made(speaker):
    """A stop that is asked for at the third piece ends a reply of 60 tokens there; transformers may make one token more."""
    pieces, stop = [], Stop()

    def take(piece):
        pieces.append(piece)
        stop.asked = len(pieces) >= 3

    reply = speaker.answer("Once", Sampling(60), take, stop)
    assert 3 <= len(pieces) <= 4
    assert reply.finish == "interrupted"
    assert reply.tokens < 8
    assert speaker.answer("Once", Sampling(60)).text.startswith("".join(pieces))


def test_a_reply_ends_at_the_tokenizers_end_token_too(tmp_path):
    """The generation config of many base models knows only <|endoftext|>, while the chat template ends turns with another token."""
    directory = save_speaker(tmp_path / "dense", generation={"eos_token_id": 256})
    speaker = load(directory)
    assert speaker.stops == [256, 257]
    with torch.no_grad():  # a model that says the end token at once
        speaker.model.lm_head.weight[257] = 50 * speaker.model.model.norm(speaker.model.model.embed_tokens.weight[ord(" ")])
        hidden = speaker.model.model(**speaker.encode("x")).last_hidden_state[0, -1]
        speaker.model.lm_head.weight[257] = 50 * hidden
    reply = speaker.answer("x", Sampling(20))
    assert (reply.finish, reply.tokens, reply.text) == ("stop", 1, "")


def test_the_generation_config_says_how_long_a_reply_is_unless_an_option_does(tmp_path):
    speaker = load(save_speaker(tmp_path / "dense", generation={"max_new_tokens": 5, "suppress_tokens": [256, 257, 258]}))
    assert speaker.answer("x", Sampling()).tokens == 5
    assert speaker.answer("x", Sampling(7)).tokens == 7


def test_a_reply_ends_where_the_context_does(tmp_path):
    speaker = load(save_speaker(tmp_path / "dense", generation={"suppress_tokens": [256, 257, 258]}, max_position_embeddings=32))
    reply = speaker.answer("x" * 20, Sampling(100))
    assert (reply.tokens, reply.prompt_tokens, reply.finish) == (12, 20, "length")
    with pytest.raises(ContextFullError, match="has 40 tokens, but the model was made for 32"):
        speaker.answer("x" * 40, Sampling(100))


def llama_tokenizer():
    """A tokenizer that writes spaces as Llama's does: a word mark on each word, the first one stripped."""
    words = ["<unk>", "def", "▁f", "():", "\n", "▁", "▁▁▁", "▁return", "▁1", "<0xE2>", "<0x82>", "<0xAC>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), [1, 2, 3, 4, 6, 7, 8, 4, 6, 9, 10, 11]


def stream(tokenizer, ids):
    pieces = []
    streamer = PieceStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return pieces


def test_streamed_code_keeps_its_indentation():
    """transformers' TextStreamer decodes line by line, and so loses the first space of each."""
    tokenizer, ids = llama_tokenizer()
    text = "def f():\n    return 1\n   €"
    assert tokenizer.decode(ids) == text
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert len(pieces) == 10, "one a token, but the three bytes of the euro sign are one"

    class Theirs(TextStreamer):
        said = ""

        def on_finalized_text(self, text, stream_end=False):
            self.said += text

    theirs = Theirs(tokenizer)
    for token in ids:
        theirs.put(torch.tensor([token]))
    theirs.end()
    assert theirs.said == "def f():\n   return 1\n  €"


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokenizer, _ = llama_tokenizer()
    assert "".join(stream(tokenizer, [1, 9, 10])) == tokenizer.decode([1, 9, 10])
    assert "\ufffd" in tokenizer.decode([1, 9, 10])


def test_other_templates_can_be_given(directory, tmp_path):
    (tmp_path / "own.jinja").write_text("Q {{ messages[0]['content'] }} A")
    turns = [{"role": "user", "content": "x"}]
    assert load(directory, str(tmp_path / "own.jinja")).encode(turns)["input_ids"].tolist() == [list(map(ord_of, "Q x A"))]
    pieces = load(directory, "pesc")
    assert pieces.tokenizer.decode(pieces.encode(turns)["input_ids"][0]) == "### Human:\nx\n### Assistant:\n"


def ord_of(character):
    return sorted(pre_tokenizers.ByteLevel.alphabet()).index("Ġ" if character == " " else character)


def broken(tmp_path, change, **speaker):
    directory = save_speaker(tmp_path / "model", **speaker)
    change(directory)
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "The model of .* cannot be loaded"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
            "The model of .* cannot be loaded",
        ),
        (lambda d: (d / "tokenizer.json").write_text("{"), "The tokenizer of .* cannot be loaded"),
        (lambda d: change_json(d / "config.json", num_hidden_layers=3), r"lacks 9 tensors \(model\.layers\.2"),
        (lambda d: change_json(d / "config.json", hidden_size=48), "The model of .* cannot be loaded"),
        (lambda d: change_json(d / "config.json", model_type="foreign", auto_map={"AutoConfig": "x.X"}), "give --trust-remote-code"),
    ],
)
def test_a_directory_that_does_not_load_is_one_sentence(tmp_path, change, message):
    with pytest.raises(ModelError, match=message) as error:
        load(broken(tmp_path, change))
    assert "\n" not in str(error.value)


def test_experts_that_a_dense_model_type_would_leave_out_are_seen(directory, tmp_path):
    (tmp_path / "sparse").mkdir()
    upcycle_directory(directory, tmp_path / "sparse", UPCYCLE)
    change_json(tmp_path / "sparse/config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(
        ModelError, match=r"has experts that its model_type 'llama' would leave out \(model\.layers\.0\.mlp\.adapters\.down\)"
    ):
        load(tmp_path / "sparse")


def test_a_tokenizer_of_another_model_is_seen(tmp_path):
    directory = save_speaker(tmp_path / "model", vocab_size=300)
    small = save_speaker(tmp_path / "small")
    for name in ("config.json", "model.safetensors"):
        (small / name).replace(directory / name)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(ModelError, match="has 260 tokens, but the model 259"):
        load(directory)


def test_no_template_and_a_template_without_system_turns_are_sentences(tmp_path):
    with pytest.raises(ModelError, match="has no chat template: give one with --chat-template"):
        load(save_speaker(tmp_path / "none", template=None)).encode(TURNS)
    with pytest.raises(ModelError, match=r"does not take the turns system, user, assistant, user \(no system turn here\)"):
        load(save_speaker(tmp_path / "some", template=WITHOUT_SYSTEM)).encode(TURNS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence(directory):
    with pytest.raises(ModelError, match="torch sees no GPU"):
        load(directory, options=LoadOptions(device="cuda"))


def test_the_template_of_these_tests_is_the_one_on_disk(directory):
    assert AutoTokenizer.from_pretrained(directory).chat_template == TEMPLATE
