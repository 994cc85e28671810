"""A stranger has torch and transformers, downloads an export, and opens it: the documented two ways, in an environment of nothing else."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pesc.models
from pesc import cli
from pesc.models.export import export_remote_code
from tests.generate.builders import save_speaker
from tests.models.bare_environment import make_environment, run_bare
from tests.models.builders import fill_bank, save_sparse

pesc.models.register()

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
NEW_TOKENS = 12
FOREIGN = ["pesc", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed"]
SCRIPT = """
import importlib.util, json, sys
from importlib.metadata import distributions
absent = [name for name in json.loads(sys.argv[4]) if importlib.util.find_spec(name) is None]
names = sorted({dist.name for dist in distributions()})
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
messages, new_tokens, answers = json.loads(sys.argv[2]), int(sys.argv[3]), {}
for directory in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loading = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    save_file({"ids": ids, "logits": logits.contiguous(), "greedy": greedy.contiguous()}, directory + ".result")
    generator = pipeline("text-generation", model=directory, trust_remote_code=True, dtype=torch.float32)
    answers[directory] = generator(messages, max_new_tokens=new_tokens, do_sample=False)[0]["generated_text"]
    for found in (model, generator.model):
        assert type(found).__module__.startswith("transformers_modules"), type(found)
assert not [name for name in sys.modules if name.split(".")[0] == "pesc"]
print("RESULT " + json.dumps({"absent": absent, "names": names, "transformers": transformers.__version__, "answers": answers}))
"""


def _oldest() -> str:
    """The oldest transformers that this package, and so its exported code, is for."""
    import tomllib
    from pathlib import Path

    declared = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]["dependencies"]
    requirement = next(r for r in map(Requirement, declared) if r.name == "transformers")
    return "transformers==" + next(s.version for s in requirement.specifier if s.operator == ">=") + ".*"


@pytest.fixture(scope="module", params=["installed", pytest.param("oldest", marks=pytest.mark.long)])
def bare(request, tmp_path_factory):
    """(python, names of its distributions, which) of the environment."""
    root = tmp_path_factory.mktemp("bare")
    try:
        python, names = make_environment(root / "venv", _oldest() if request.param == "oldest" else None)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot install {_oldest()} here: {error.stderr[-300:]}")
    return python, names, request.param


def export_speaker(root, model_type):
    """(the model in this package's class, its export) with shards, a chat template, and adapters that do something."""
    dense = save_speaker(root / "dense", model_type=model_type, generation={"max_new_tokens": 64}, shard_size="20KB")
    model = fill_bank(AutoModelForCausalLM.from_pretrained(save_sparse(dense, root / "sparse"), dtype=torch.float32)).eval()
    model.save_pretrained(root / "trained", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(dense).save_pretrained(root / "trained")
    (root / "exported").mkdir()
    export_remote_code(root / "trained", root / "exported")
    assert len(list((root / "exported").glob("model-*-of-*.safetensors"))) > 1
    return model, root / "exported"


@pytest.mark.slow
def test_an_export_opens_and_computes_the_same_with_transformers_alone(tmp_path, bare):
    python, names, which = bare
    exports = [export_speaker(tmp_path / model_type, model_type) for model_type in ("llama", "qwen2", "gemma3_text")]
    (tmp_path / "home").mkdir()
    (tmp_path / "open.py").write_text(SCRIPT)
    directories = json.dumps([str(exported) for _, exported in exports])
    out = run_bare(python, tmp_path / "open.py", directories, json.dumps(MESSAGES), NEW_TOKENS, json.dumps(FOREIGN), home=tmp_path / "home")
    said = json.loads(out.partition("RESULT ")[2])
    assert {canonicalize_name(name) for name in said["names"]} == names, "nothing is there that these do not require"
    assert said["absent"] == FOREIGN
    version = _oldest().partition("==")[2].removesuffix("*") if which == "oldest" else transformers.__version__
    assert said["transformers"].startswith(version)
    for model, exported in exports:
        check_the_same(model, exported, said["answers"][str(exported)])


def check_the_same(model, exported, answer):
    """Logits, greedy tokens and the pipeline's words, against the model in this package's class."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    theirs = load_file(f"{exported}.result")
    assert torch.equal(theirs["ids"], ids)
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        plain = model_without_adapters(model, ids)
    assert (theirs["logits"] - logits).abs().max() <= 1e-5
    assert (plain - logits).abs().max() > 0.1, "the adapters take part"
    assert torch.equal(theirs["greedy"], greedy)
    text = tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer == [*MESSAGES, {"role": "assistant", "content": text}]


def model_without_adapters(model, ids):
    """Logits when no adapter adds anything; the bank is as it was afterwards."""
    banks = [parameter for name, parameter in model.named_parameters() if name.endswith("adapters.up")]
    kept = [bank.clone() for bank in banks]
    for bank in banks:
        bank.zero_()
    logits = model(ids).logits
    for bank, values in zip(banks, kept, strict=True):
        bank.copy_(values)
    return logits


def test_an_export_is_all_that_a_stranger_needs(tmp_path, monkeypatch):
    """The files, by name: weights in shards and their index, settings of the model and of generation, tokenizer, template, code."""
    dense = save_speaker(tmp_path / "dense", generation={"max_new_tokens": 64}, shard_size="20KB")
    save_sparse(dense, tmp_path / "sparse")
    monkeypatch.setattr(
        sys, "argv", ["pesc", "export", str(tmp_path / "sparse"), "--format", "remote-code", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    found = {path.name for path in (tmp_path / "out").iterdir()} - shards
    assert found == {
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "modeling_pesc.py",
    }  # fmt: skip
    assert shards <= {path.name for path in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["max_new_tokens"] == 64
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "_name_or_path" not in config
    assert str(tmp_path) not in json.dumps(config)
