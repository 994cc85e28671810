"""The study's recipes: arms that differ in nothing but what is asked about, and a control of equal size."""

import re
import statistics
from pathlib import Path

import pytest

from pesc.pipeline import build_graph
from pesc.recipe import load_recipe
from pesc.train.blocks import PackedBlocks
from pesc.train.order import BlockOrder, count_steps
from tests.study.test_study import table_of
from tests.train.tiny import write_blocks

NAMES = ("study/smollm2", "study/smollm2-6-layers")
ARMS = ("pesc", "qlora", "qlora-matched", "pesc-r256", "pesc-no-balance", "pesc-bias", "pesc-ffn-input", "upcycle-full")


def runs(arm):
    return (arm, f"{arm}-s2", f"{arm}-s3")


@pytest.mark.parametrize("name", NAMES)
def test_eight_arms_of_three_seeds_share_rows_order_and_steps(name, tmp_path):
    recipe = load_recipe(name)
    assert set(recipe.arms) == {run for arm in ARMS for run in runs(arm)} | {"base"}
    assert {arm: names for arm, names in recipe.report.replicates.items()} == {arm: runs(arm)[1:] for arm in ARMS}
    graph = build_graph(recipe)
    blocks = PackedBlocks(write_blocks(tmp_path / "blocks", 40))
    plans = {}
    for arm in recipe.arms:
        if arm == "base":
            continue
        node = graph.by_address[f"train[{arm}]"]
        assert node.inputs["blocks"] == "tokenize"
        config = node.config
        order = BlockOrder(len(blocks), config.seed)
        steps = count_steps(len(blocks), config.global_batch_size, config.epochs, config.max_steps)
        read = tuple(order.block_at(position) for position in range(steps * config.global_batch_size))
        schedule = (config.learning_rate, config.warmup_ratio, config.schedule, config.weight_decay, config.max_grad_norm)
        plans[arm] = (read, config.global_batch_size, schedule)
    for number in range(3):
        assert len({plans[runs(arm)[number]] for arm in ARMS}) == 1, "arms of one seed read other blocks, or with another schedule"
    assert len({plans[run] for run in runs("pesc")}) == 3, "seeds that change nothing"
    assert {f"heldout[{arm}]" for arm in recipe.arms} <= set(graph.by_address)


@pytest.mark.parametrize("name", NAMES)
def test_the_arms_differ_in_what_they_are_named_for(name):
    recipe = load_recipe(name)
    for number, run in enumerate(runs("pesc"), start=1):
        plain_train, plain_upcycle = (part.model_dump() for part in (recipe.train_of(run), recipe.upcycle_of(run)))
        assert (plain_train["seed"], plain_upcycle["seed"]) == (number, number)
        assert (plain_upcycle["num_experts"], plain_upcycle["top_k"], plain_upcycle["adapter_dim"]) == (8, 2, 64)

        def differs(arm, number=number, train=plain_train, upcycle=plain_upcycle):
            other = runs(arm)[number - 1]
            found = {f"train.{key}" for key, value in recipe.train_of(other).model_dump().items() if value != train[key]}
            if recipe.arms[other].method == "pesc":
                found |= {f"upcycle.{key}" for key, value in recipe.upcycle_of(other).model_dump().items() if value != upcycle[key]}
            return found

        assert differs("qlora") == {"train.method"}
        assert differs("qlora-matched") == {"train.method", "train.lora"}
        assert differs("pesc-r256") == {"upcycle.adapter_dim"}
        assert differs("pesc-no-balance") == differs("pesc-bias") == {"train.balance"}
        assert differs("pesc-ffn-input") == {"upcycle.adapter_input"}
        assert differs("upcycle-full") == {"train.method", "train.quantization"}
        full = recipe.upcycle_of(runs("upcycle-full")[number - 1])
        assert (full.kind, full.num_experts, full.top_k) == ("whole", 4, 2)


def test_the_slice_is_the_same_study_of_fewer_layers_rows_and_steps():
    whole, part = (load_recipe(name) for name in NAMES)
    assert (whole.sources["smollm2"].layers, part.sources["smollm2"].layers) == (None, (0, 6, 12, 18, 24, 29))
    assert part.report.preregistration == whole.report.preregistration
    assert part.arms == whole.arms
    assert "slice" in part.report.title
    assert "slice" in part.description


def test_everything_that_the_default_study_reads_is_on_pypi():
    for name in NAMES:
        assert all(source.uri.startswith("pypi:") and source.sha256 for source in load_recipe(name).sources.values())


def test_each_benchmark_is_decontaminated_against():
    for name in NAMES:
        recipe = load_recipe(name)
        asked = {(b.source, next(iter(b.files.values()))) for b in recipe.evaluate.benchmarks.values()}
        assert asked <= {(b.source, b.files[0]) for b in recipe.dedup.benchmarks.values()}


def test_the_matched_control_has_the_parameters_that_the_recipe_says(tmp_path):
    """One layer of the real width, counted in the models that training makes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from pesc.models.upcycle import upcycle_directory
    from pesc.train.modeling import count_trainable, load_trainable

    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).save_pretrained(dense)  # fmt: skip
    recipe = load_recipe("study/smollm2-6-layers")
    sparse.mkdir()
    upcycle_directory(dense, sparse, recipe.upcycle_of("pesc"))

    def trained(arm, model):
        config = recipe.train_of(arm).model_copy(update={"quantization": "none"})
        return {group.group: group.parameters for group in count_trainable(load_trainable(model, config, "cpu", "none"))}

    ours, control = trained("pesc", sparse), trained("qlora-matched", dense)
    assert ours == {"lora": 16 * 10_176, "bank": 8 * 2 * 64 * 576, "router": 8 * 576}
    assert sum(ours.values()) == 757_248
    rank = recipe.train_of("qlora-matched").lora.rank
    assert control == {"lora": rank * 10_176} == {"lora": 763_200}
    assert (rank - 1) * 10_176 < sum(ours.values()) <= rank * 10_176, "the smallest rank that gives the control no fewer"
    for arm in ("pesc", "qlora-matched"):
        lora = recipe.train_of(arm).lora
        assert lora.alpha / lora.rank == 1


def seconds(text):
    number, unit = text.split()
    return float(number) * {"s": 1, "min": 60}[unit]


def test_the_readme_says_what_the_committed_study_says():
    """The figures of the README's table and sentences are those of the study.md beside the benchmarks."""
    root = Path(__file__).resolve().parents[2]
    page = (root / "tests/benchmarks/study/study.md").read_text()
    readme = (root / "README.md").read_text()
    section = readme[readme.index("### Results of the study") : readme.index("## The sparse layer")]
    groups = [row for row in table_of(page, "## Held-out loss") if "[" in row[2]]
    losses = {row[0]: [f"{float(number):.2f}" for number in re.findall(r"\d+\.\d+", row[2])] for row in groups}
    said = {row[0].split("`")[1]: re.findall(r"\d+\.\d+", row[2]) for row in table_of(section, "nats per token, 3 seeds") if "`" in row[0]}
    assert said == losses
    took = [row for row in table_of(page, "## What it took") if row[0] != "base"]
    for row in table_of(section, "nats per token, 3 seeds"):
        runs = [cells for cells in took if re.sub(r"-s\d$", "", cells[0]) == row[0].split("`")[1]]
        assert len(runs) == 3
        assert row[3] == f"{statistics.median(float(cells[3]) for cells in runs):.0f}"
        trained = int(runs[0][2].replace(",", "")) / 1e6
        assert row[1] == f"{trained:.{2 if trained < 10 else 1}f} M"
        assert row[5] == f"{statistics.median(seconds(cells[5]) for cells in runs):.0f} s"
        assert row[4] == f"{statistics.median(float(cells[4].split()[0]) for cells in runs):.2f} GB"
    answers = {(row[0], row[1], row[2]): re.findall(r"[−+]\d+\.\d+", row[3]) for row in table_of(page, "## Pre-registered questions")}
    for key, sentence in {
        ("primary", "pesc − qlora-matched", "mean"): "It cannot be told:** {}",
        ("secondary", "pesc − qlora", "mean"): "PESC against the same LoRA alone, of a fifth of its parameters: {}",
        ("domain", "pesc − qlora-matched", "code"): "code ({})",
        ("secondary", "upcycle-full − pesc", "mean"): "Full upcycling learnt more than PESC: {}, the one verdict that passed",
    }.items():
        difference, low, high = (f"{float(number.replace('−', '-')):+.2f}".replace("-", "−") for number in answers[key])
        assert sentence.format(f"{difference} [{low}, {high}]") in section
    verdicts = {row[1]: row[7] for row in table_of(page, "## Pre-registered questions") if row[0] != "domain"}
    assert {pair for pair, verdict in verdicts.items() if verdict != "cannot tell"} == {"upcycle-full − pesc"}
    benchmarks = [row for row in table_of(page, "## Benchmarks") if " − qlora-matched" in row[0]]
    assert len(benchmarks) == 28
    assert {row[-1] for row in benchmarks} == {"cannot tell"}
    assert (root / "tests/benchmarks/study/plots/questions.png").read_bytes()[:4] == b"\x89PNG"
