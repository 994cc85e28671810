"""A model directory that brings Python files: they are data, whoever loads the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pesc.errors import DataError, ModelError
from pesc.remote_code import refuse_own_code
from tests.evaluate.builders import build_model

LOADERS = {
    "tokenize": "from pesc.data.encoding import load_tokenizer as f; f(path)",
    "train's settings": "from pesc.train.modeling import _read_config as f; from pesc.train.config import TrainConfig; f(path, TrainConfig())",
    "train's model": "from pesc.train.modeling import _load_base as f; from pesc.train.config import TrainConfig; "
    "f(path, TrainConfig(method='lora', quantization='none', compute_dtype='float32'), 'cpu')",
    "evaluate's template": "from pesc.evaluate.harness import _require_chat_template as f; from pesc.evaluate.config import BenchmarkConfig; "
    "f(BenchmarkConfig(task='x', apply_chat_template=True), path)",
    "evaluate's model": "from pesc.evaluate.language_model import load_language_model as f; from pesc.evaluate.journal import Journal; "
    "f(path, device='cpu', dtype='float32', batch_size=1, journal=Journal(path.parent / 'journal', []), on_progress=print)",
    "routing's model": "from pesc.routing.loading import load_model as f; f(path, 'it', 'float32', 'cpu')",
    "routing's tokenizer": "from pesc.routing.loading import load_tokenizer as f; f(path, 'it')",
    "the proof's model": "from pesc.models.proof import load as f; f(path)",
    "the proof's tokenizer": "from pesc.models.proof import encode as f; f(path, ['a'])",
    "paraphrases": "from pesc.data import semantic; here = path.parent; "
    "(here / 'q').write_text(json.dumps({'row_groups': [0], 'rows': ['a'], 'items': []})); "
    "semantic.main(str(path), str(here / 'q'), str(here / 'a'), '0.5')",
    "pesc chat": "from pesc.generate.speaker import load_speaker as f; from pesc.generate.settings import LoadOptions; "
    "from pesc.model_argument import ModelPlace; "
    "f(ModelPlace(path, 'it', json.loads((path / 'config.json').read_text())), LoadOptions('cpu', 'float32', False, False))",
}  # fmt: skip
EVIL = "import pathlib; pathlib.Path({path!r}).write_text('executed')\n"
CLASSES = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = {model_type!r}
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def plant(folder: Path, model_type: str) -> Path:
    """A real tiny model whose config and tokenizer name classes of a file that says so when it is run; returns what that would write."""
    build_model(folder)
    mark = folder.parent / "executed"
    (folder / "evil.py").write_text(EVIL.format(path=str(mark)) + CLASSES.format(model_type=model_type))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": model_type,
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    if model_type != "llama":
        tokenizer["tokenizer_class"] = "EvilTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return mark


def load(statement: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a loader in a process of its own, as stages do; "y" waits on its stdin for whoever asks."""
    program = f"import json, pathlib; path = pathlib.Path({str(folder)!r}); {statement}"
    return subprocess.run([sys.executable, "-c", program], input="y\ny\ny\n", capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_code_of_a_model_is_not_run(tmp_path, loader):
    mark = plant(tmp_path / "model", "evil")
    done = load(LOADERS[loader], tmp_path / "model")
    assert not mark.exists(), f"{loader} has run it"
    assert (done.returncode != 0) == (loader != "evaluate's template"), "that one leaves it to whoever loads the model"
    assert not mark.with_name("a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("loader", [name for name in LOADERS if name not in ("paraphrases",)])
def test_a_known_type_is_loaded_by_transformers_own_class(tmp_path, loader):
    """Many models of the hub bring old copies of classes that transformers has."""
    mark = plant(tmp_path / "model", "llama")
    done = load(LOADERS[loader], tmp_path / "model")
    assert not mark.exists(), f"{loader} has run it"
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_trap_works(tmp_path):
    """With the permission the file is run, so that without it there was something to be run."""
    mark = plant(tmp_path / "model", "evil")
    load("from transformers import AutoConfig as f; f.from_pretrained(path, trust_remote_code=True)", tmp_path / "model")
    assert mark.read_text() == "executed"


def test_the_refusal_names_the_type_and_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    with pytest.raises(ModelError, match=r"model_type 'evil', which transformers has no class for.*pesc chat DIR --trust-remote-code"):
        refuse_own_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    refuse_own_code(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.A", null]}}')
    with pytest.raises(ModelError, match="tokenizer of class 'EvilTokenizer'"):
        refuse_own_code(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("not json")
    refuse_own_code(tmp_path)


def test_a_stage_says_it_before_it_loads_anything(tmp_path):
    from pesc.data.encoding import load_tokenizer

    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    with pytest.raises((ModelError, DataError), match="Python files of its own"):
        load_tokenizer(tmp_path)
