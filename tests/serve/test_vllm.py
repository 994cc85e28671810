"""A real sparse model behind the real vLLM: it says what transformers says, to many clients, streamed, and leaves nothing behind.

The first layers of SmolLM2 with experts that differ; or what `PESC_SERVED` names, a directory with `dense` and `sparse` in it, such as the
links of a trained model's `download` and `merge` objects.
"""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pesc.models
from pesc.models.export import export_remote_code
from pesc.moe.router import find_routers
from tests.data.conftest import real_conversations, smollm2  # noqa: F401  (fixtures)
from tests.serve.builders import ROOT, ask, save_slice, served, start, vllm_python, wait_until_gone

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LAYERS, PROMPTS, NEW_TOKENS, GENERATED = 6, 50, 24, 4
LOGIT_TIE, ROUTE_TIE = 2e-3, 1e-4
"""Differences that the order of float32 sums can turn: of two logits, and of the last chosen and the first other expert's router logits."""
OPTIONS = ("--max-model-len", "1024", "--", "--kv-cache-memory-bytes", str(1 << 30))

pesc.models.register()


@pytest.fixture(scope="module")
def python():
    return vllm_python()


@pytest.fixture(scope="module")
def place(tmp_path_factory, python, request) -> Path:
    if given := os.environ.get("PESC_SERVED"):
        return Path(given)
    return save_slice(request.getfixturevalue("smollm2"), tmp_path_factory.mktemp("served"), LAYERS)


@pytest.fixture(scope="module")
def model(place):
    return AutoModelForCausalLM.from_pretrained(place / "sparse", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(place):
    return AutoTokenizer.from_pretrained(place / "sparse")


@pytest.fixture(scope="module")
def texts(request):
    """Real questions where they are, else the README's lines."""
    try:
        conversations = request.getfixturevalue("real_conversations")()
    except pytest.skip.Exception:
        lines = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 60]
        return lines[:PROMPTS]
    step = len(conversations) // PROMPTS
    users = (next(text for role, text in conversation if role == "user") for conversation in conversations[::step])
    return [text[:600] for text in users][:PROMPTS]


@pytest.fixture(scope="module")
def answers(place, python, tokenizer, texts, tmp_path_factory):
    """All that the clients ask one server."""
    room = tmp_path_factory.mktemp("clients")
    messages = [{"role": "user", "content": texts[0]}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    requests = [
        {"kind": "greedy", "prompts": [tokenizer(text).input_ids for text in texts], "tokens": NEW_TOKENS, "clients": 16},
        {"kind": "streamed", "prompt": texts[1], "tokens": NEW_TOKENS},
        {"kind": "chatted", "messages": messages, "rendered": rendered, "tokens": NEW_TOKENS},
    ]
    with served(place / "sparse", python, *OPTIONS, log=room / "log") as url:
        found = ask(python, url, {"requests": requests}, room)
    return found | {"log": (room / "log").read_text()}


def greedy(model, ids):
    row, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
    with torch.no_grad():
        out = model.generate(row, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, len(ids) :].tolist()


def routing(model, ids):
    """Logits [T, V], and each layer's router logits [T, E], of one row."""
    seen = []
    hooks = [router.register_forward_hook(lambda _m, _a, out: seen.append(out[0])) for router in find_routers(model).values()]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, seen


def margins(router_logits, top_k=2):
    """How far the first expert that is not chosen is behind the last one that is, [T]."""
    top = router_logits.topk(top_k + 1, dim=-1).values
    return top[:, top_k - 1] - top[:, top_k]


def test_fifty_prompts_by_sixteen_clients_give_transformers_tokens(answers, model, tokenizer, texts):
    """Each token is the likeliest one after those before it, by transformers; for some rows `generate` says them too."""
    theirs, unequal, total = answers["results"][0], [], 0
    assert len(texts) == len(theirs) == PROMPTS
    for number, (text, found) in enumerate(zip(texts, theirs, strict=True)):
        ids = tokenizer(text).input_ids
        assert len(found) == NEW_TOKENS or found[-1] == tokenizer.eos_token_id
        logits, routers = routing(model, ids + found[:-1])
        likeliest = logits[len(ids) - 1 :].argmax(-1).tolist()
        total += len(found)
        wrong = [at for at, pair in enumerate(zip(found, likeliest, strict=True)) if pair[0] != pair[1]]
        for at in wrong:
            row = len(ids) - 1 + at
            gap = (logits[row, likeliest[at]] - logits[row, found[at]]).item()
            closest = min(margins(layer)[: row + 1].min().item() for layer in routers)
            unequal.append((number, at, gap, closest))
            assert gap < LOGIT_TIE or closest < ROUTE_TIE, f"{text!r}: token {at}, logits {gap} apart, experts {closest}"
        if number < GENERATED and not wrong:
            assert greedy(model, ids) == found
    print(f"{total - len(unequal)} of {total} tokens equal; near ties (prompt, token, logits, experts): {unequal}")
    assert len(unequal) <= total // 50


def test_vllm_chooses_the_experts_that_transformers_chooses(place, python, model, tokenizer, texts, tmp_path):
    (tmp_path / "exported").mkdir()
    export_remote_code(place / "sparse", tmp_path / "exported")
    rows = [tokenizer(text).input_ids for text in texts[:10]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "hf")}
    program = [
        python,
        str(ROOT / "tests/serve/routing_program.py"),
        *map(str, (tmp_path / n for n in ("exported", "rows.json", "choices.json"))),
    ]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    used, differ, total = set(), 0, 0
    for row, layers in zip(rows, json.loads((tmp_path / "choices.json").read_text()), strict=True):
        _, routers = routing(model, row)
        assert len(layers) == len(routers) == model.config.num_hidden_layers
        for found, logits in zip(layers, routers, strict=True):
            expected, close = logits.topk(2, dim=-1).indices.sort(-1).values, margins(logits) < ROUTE_TIE
            unequal = (torch.tensor(found).sort(-1).values != expected).any(-1)
            assert not (unequal & ~close).any()
            differ, total = differ + int(unequal.sum()), total + len(row)
            used |= set(expected.flatten().tolist())
    print(f"{total - differ} of {total} choices equal, the others near ties")
    assert used == set(range(8))


def test_a_stream_is_the_reply_in_pieces(answers):
    found = answers["results"][1]
    assert len(found["pieces"]) > 4
    assert "".join(found["pieces"]) == found["whole"]


def test_the_chat_endpoint_renders_the_models_template(answers):
    found = answers["results"][2]
    assert found["chat"] == found["completion"] != ""


def test_the_name_is_the_directorys_and_vllm_merged_the_ffn(answers):
    assert answers["model"] == "sparse"
    assert re.search(r"Fused: gate_proj \+ up_proj \(mlp: PescLlamaMLP\)", answers["log"])


def test_a_dense_model_is_served_by_the_same_command_and_dies_with_its_parent(place, python, tmp_path, monkeypatch):
    mark = f"PESC_TEST_MARK={tmp_path.name}"
    monkeypatch.setenv(*mark.split("="))
    process, url = start(place / "dense", python, *OPTIONS, log=tmp_path / "log")
    assert ask(python, url, {"requests": [{"kind": "speed", "prompts": ["The sky"], "tokens": 4}]}, tmp_path)["results"][0]["tokens"] == 4
    process.send_signal(signal.SIGKILL)
    process.communicate()
    monkeypatch.delenv("PESC_TEST_MARK")
    assert wait_until_gone(mark, 60) == []
