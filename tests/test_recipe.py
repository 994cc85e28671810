"""Recipes and overrides: typed, complete, and wrong ones are sentences that name the field."""

from pathlib import Path

import pytest
import yaml

import pesc
from pesc.errors import RecipeError
from pesc.pipeline import build_graph
from pesc.recipe import load_recipe, recipe_names
from tests.fake_stages import tiny_recipe_dict


@pytest.fixture
def write(tmp_path):
    def _write(changes=None, name="tiny", **extra):
        raw = {**tiny_recipe_dict(tmp_path), **(changes or {}), **extra}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return str(path)

    return _write


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_has_a_graph(name):
    recipe = load_recipe(name)
    assert recipe.name == name.replace("/", "-")
    assert load_recipe(recipe.name) == recipe
    assert recipe.description
    assert {node.stage.name for node in build_graph(recipe).nodes} >= {
        "download",
        "dedup",
        "mix",
        "tokenize",
        "train",
        "merge",
        "evaluate",
        "report",
    }


PAPER = {"camelidae-8x7b": "Llama-2-7b", "camelidae-8x13b": "Llama-2-13b", "camelidae-8x34b": "Yi-34B"}


@pytest.mark.parametrize("path", sorted(Path(pesc.__file__).parent.glob("recipes/**/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_the_same_without_libyaml(path):
    """PyYAML's own parser refuses more than the C one: a question mark in a flow mapping, for instance."""
    text = path.read_text(encoding="utf-8")
    assert yaml.load(text, yaml.SafeLoader) == yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@pytest.mark.parametrize("name", PAPER)
def test_camelidae_recipes_have_the_papers_values(name):
    """PESC, Tables 5 and 6 and section 3.1; 520,000 instructions at 3:1:1."""
    recipe = load_recipe(name)
    assert PAPER[name] in recipe.sources[recipe.base].uri
    assert (recipe.upcycle.num_experts, recipe.upcycle.top_k, recipe.upcycle.adapter_dim) == (8, 2, 512)
    train = recipe.train
    assert (train.learning_rate, train.epochs, train.global_batch_size, train.warmup_ratio) == (2e-4, 1.0, 128, 0.03)
    assert (train.lora.rank, train.lora.alpha, train.quantization, train.schedule) == (64, 16, "nf4", "constant_with_warmup")
    assert (train.balance.kind, train.balance.coefficient) == ("switch", 0.01)
    assert recipe.tokenize.context_length == 2048
    assert recipe.mix.total == 520_000
    share = {d: w / sum(recipe.mix.weights.values()) for d, w in recipe.mix.weights.items()}
    assert {d: round(520_000 * s) for d, s in share.items()} == {"general": 312_000, "code": 104_000, "math": 104_000}
    hub = " ".join(source.uri for source in recipe.sources.values())
    for name_ in (
        "Open-Orca/SlimOrca",
        "ise-uiuc/Magicoder-OSS-Instruct-75K",
        "ise-uiuc/Magicoder-Evol-Instruct-110K",
        "meta-math/MetaMathQA",
    ):
        assert f"hub:datasets/{name_}@" in hub
    shots = {b.task: b.num_fewshot for b in recipe.evaluate.benchmarks.values()}
    assert shots["mmlu"] == 5
    assert shots["gsm8k"] == 5
    assert {arm.method for arm in recipe.arms.values()} >= {"pesc", "qlora"}


def test_overrides_are_typed_by_the_models(write):
    recipe = load_recipe(write(), ["train.learning_rate=3e-4", "upcycle.num_experts=4", "arms.pesc.train.seed=7", "execution.zero_stage=3"])
    assert recipe.train.learning_rate == 3e-4
    assert recipe.upcycle.num_experts == 4
    assert recipe.train_of("pesc").seed == 7
    assert recipe.train_of("qlora").seed == 42
    assert recipe.train_of("qlora").method == "qlora"
    assert recipe.execution.zero_stage == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", r"train\.learning_rat: there is no such setting"),
        ("train.learning_rate=-1", r"train\.learning_rate: Input should be greater than 0 \(got -1\)"),
        ("train.learning_rate=fast", r"train\.learning_rate: .*number"),
        ("upcycle.top_k=9", r"top_k \(9\) is larger than num_experts \(8\)"),
        ("arms.pesc.upcycle.top_k=9", r"arms\.pesc\.upcycle: top_k \(9\)"),
        ("dedup.near_duplicate_threshold=1.5", r"near_duplicate_threshold: .*less than or equal to 1 \(got 1\.5\)"),
        ("train.micro_batch_size=3", "must be a multiple of micro_batch_size"),
        ("mix.weights.poetry=1", "names the domain 'poetry', but no data set has it"),
        ("base=nothing", "base names the source 'nothing'"),
        ("arms.pesc.method=moe", r"arms\.pesc\.method"),
        ("no-equals-sign", "must look like train.learning_rate=2e-4"),
        ("train=[", "not valid YAML"),
        ("train.learning_rate=.inf", r"train\.learning_rate: Input should be a finite number"),
        ("mix.weights.general=.nan", r"mix\.weights\.general: Input should be a finite number"),
        ('report.title="ok \\udcff"', "after .*ok .* stands a character that is not valid Unicode"),
        (f"name={'n' * 101}", "name: String should have at most 100 characters"),
        ('arms={"pesc\\n": {method: pesc}}', "cannot be a name"),
    ],
)
def test_a_wrong_override_is_a_sentence_that_names_the_field(write, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(), [override])


def test_an_unknown_recipe_suggests_the_nearest():
    with pytest.raises(RecipeError, match=r"no recipe 'dmo'\. Did you mean 'demo'"):
        load_recipe("dmo")
    for missing in ("./missing.yaml", f"{'n' * 5000}.yaml"):
        with pytest.raises(RecipeError, match="There is no recipe file"):
            load_recipe(missing)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "must hold a map"),
        ("\x00", "not valid YAML"),
        ("extends: [demo]", "must be the name or the path of one recipe"),
    ],
)
def test_a_broken_file_is_a_sentence(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(path))


def test_extends_merges_maps_and_replaces_the_rest(write, tmp_path):
    write()
    child = tmp_path / "child.yaml"
    child.write_text("extends: tiny\nname: child\ntrain:\n  lora:\n    rank: 8\n    targets: [q_proj]\n")
    recipe = load_recipe(str(child))
    assert recipe.name == "child"
    assert recipe.train.lora.rank == 8
    assert recipe.train.lora.targets == ("q_proj",)
    assert recipe.train.lora.alpha == 16
    (tmp_path / "grandchild.yaml").write_text("extends: child\nname: grandchild\n")
    with pytest.raises(RecipeError, match="one level"):
        load_recipe(str(tmp_path / "grandchild.yaml"))


def test_a_path_in_extends_is_relative_to_the_file_that_holds_it(write, tmp_path, monkeypatch):
    write()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "child.yaml").write_text("extends: ../tiny.yaml\nname: child\n")
    monkeypatch.chdir("/")
    assert load_recipe(str(tmp_path / "sub" / "child.yaml")).mix.total == 10


def test_an_arm_without_quantisation_says_so_itself(write):
    """The recipe's own default is 4 bit; the arm's method decides."""
    recipe = load_recipe(write({"arms": {"pesc": {"method": "pesc"}, "lora": {"method": "lora"}}, "merge": {"base": "dequantized"}}))
    assert (recipe.train_of("pesc").quantization, recipe.train_of("lora").quantization) == (recipe.train.quantization, "none")
    configs = {node.address: node.config for node in build_graph(recipe).nodes}
    assert (configs["merge[pesc]"].base, configs["merge[lora]"].base) == ("dequantized", "original")
    assert "upcycle[lora]" not in configs


def test_an_arm_without_quantisation_refuses_it(write):
    with pytest.raises(
        RecipeError, match="method lora trains on weights that are not quantised: set quantization to none, or use method qlora"
    ):
        load_recipe(write({"arms": {"lora": {"method": "lora", "train": {"quantization": "nf4"}}}}))


def test_an_arm_of_whole_experts_is_upcycled_without_the_settings_of_adapters(write):
    recipe = load_recipe(
        write(
            {
                "arms": {"pesc": {"method": "pesc"}, "full": {"method": "upcycle-full", "upcycle": {"num_experts": 4}}},
                "upcycle": {"top_k": 2, "adapter_dim": 64, "shared_adapter_dim": 8, "seed": 3},
            }
        )
    )
    full = recipe.upcycle_of("full")
    assert (full.kind, full.num_experts, full.top_k, full.seed) == ("whole", 4, 2, 3)
    nodes = {node.address: node for node in build_graph(recipe).nodes}
    assert nodes["train[full]"].inputs["model"] == nodes["merge[full]"].inputs["model"] == "upcycle[full]"
    assert nodes["train[full]"].config.quantization == "none"
    with pytest.raises(RecipeError, match="adapter_dim is a setting of adapters"):
        load_recipe(write({"arms": {"full": {"method": "upcycle-full", "upcycle": {"adapter_dim": 64}}}}))
    with pytest.raises(RecipeError, match="routers have no bias to select with"):
        load_recipe(write({"arms": {"full": {"method": "upcycle-full", "train": {"balance": {"kind": "bias"}}}}}))
