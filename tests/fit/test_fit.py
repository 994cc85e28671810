"""`pesc fit`: memory, layouts, speed and cost of recipes, against published figures and arithmetic that was done apart from it."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console
from transformers import LlamaConfig

from pesc.devices import DEVICES, parse_gpus
from pesc.errors import RecipeError
from pesc.fit.planner import Question, base_shape, count_blocks, count_tokens, fit_recipe
from pesc.fit.speed import flops_per_token, tokens_per_second
from pesc.fit.table import as_json, print_fits, verdict_of
from pesc.moe.config import PescConfig
from pesc.plan import Selection
from pesc.recipe import Recipe, load_recipe
from pesc.run import run_recipe
from pesc.stage import BuildResult
from pesc.store import Store
from pesc.train.config import TrainConfig
from pesc.train.memory.need import Layout, Run, largest_micro_batch, need_of, usable_bytes
from pesc.train.memory.shapes import KNOWN_BASES
from tests import fake_stages

PESC = [sys.executable, "-m", "pesc.cli", "fit"]


def question(gpu: str, **more) -> Question:
    device, count = parse_gpus(gpu)
    return Question(device, count, more.pop("blocks", 50_000), "a test", **more)


def fit_of(recipe: str, gpu: str, arm: str, *overrides: str, **more):
    loaded = load_recipe(recipe, overrides)
    return fit_recipe(loaded, base_shape(loaded, None, None, None), question(gpu, **more), [arm])[0]


def run_of(base: str, block: PescConfig | None = None, **config) -> Run:
    return Run(KNOWN_BASES[base], block, TrainConfig.model_validate({"method": "pesc" if block else "qlora"} | config), 2048)


# ---- memory


def test_groups_add_up_to_the_total():
    for gpu in ("h200:1", "a100-80:16", "rtx4090:8"):
        fit = fit_of("camelidae-8x7b", gpu, "pesc")
        for option in (fit.as_set, *([fit.best] if fit.best else [])):
            assert sum(option.need.groups().values()) == option.need.total


@pytest.mark.parametrize(
    ("recipe", "hidden", "layers"), [("camelidae-8x7b", 4096, 32), ("camelidae-8x13b", 5120, 40), ("camelidae-8x34b", 7168, 60)]
)
def test_wider_adapters_cost_weights_masters_gradients_and_both_moments(recipe, hidden, layers):
    narrow, wide = (fit_of(recipe, "h200:1", "pesc", f"upcycle.adapter_dim={width}").as_set.need.states for width in (64, 512))
    more = layers * 8 * 2 * (512 - 64) * hidden
    assert wide.trained["bank"] - narrow.trained["bank"] == 2 * more
    assert wide.total - narrow.total == (2 + 4 + 4 + 8) * more
    assert wide.base == narrow.base


def test_zero_2_shares_what_is_trained_and_keeps_the_base():
    one, sixteen = (fit_of("camelidae-8x7b", gpu, "pesc").as_set.need.states for gpu in ("a100-80:1", "a100-80:16"))
    assert sixteen.base == one.base
    for group in ("masters", "gradients", "optimizer"):
        assert getattr(sixteen, group) == pytest.approx(getattr(one, group) / 16, rel=1e-5)


def test_published_runs_fit_where_they_were_run():
    """Camelidae on 16 A100-80GB; Llama-2-70B by QLoRA and ZeRO-3 on two 40 GB cards, at 36.6 GB each (PEFT's guide)."""
    for recipe in ("camelidae-8x7b", "camelidae-8x13b", "camelidae-8x34b"):
        assert fit_of(recipe, "a100-80:16", "pesc").fits
    need = need_of(run_of("llama-2-70b", lora={"rank": 8}, optimizer="adamw_torch_fused"), Layout(2, 3, "full", 1))
    assert 0.7 * 36.6e9 < need.total < usable_bytes(DEVICES["a100-40"].memory)


def test_qlora_of_8b_is_near_its_published_peak():
    """Torchtune: Llama-3-8B, two packed blocks of 2,048: 7.4 GiB on an RTX 4090."""
    run = run_of("llama-3-8b", lora={"rank": 8, "dropout": 0.0}, optimizer="paged_adamw_8bit")
    need = need_of(run, Layout(1, 2, "full", 2))
    assert need.tensors - need.buckets == pytest.approx(7.4 * 2**30, rel=0.15)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    run, layout, memory = run_of("llama-2-7b", PescConfig(adapter_dim=64)), Layout(1, 2, "full", 1), 30_000_000_000
    blocks = largest_micro_batch(run, layout, memory)
    sizes = [need_of(run, Layout(1, 2, "full", size)).total for size in (blocks, 2 * blocks)]
    assert sizes[0] <= memory < sizes[1]
    assert run.config.global_batch_size % blocks == 0
    assert largest_micro_batch(run, layout, 5_000_000_000) == 0


def test_loading_counts_where_zero_3_shards_afterwards():
    """Every rank has the whole 4-bit model first: 34B with a bank of 7 GB does not pass through 24 GB, however many share it."""
    need = need_of(run_of("yi-34b", PescConfig(adapter_dim=512)), Layout(64, 3, "full", 1))
    assert need.tensors == need.loading > 24e9
    assert need.states.total < 24e9


# ---- what is recommended


def test_the_recommendation_fits_and_is_no_slower():
    for gpu in ("h200:1", "a100-80:16", "a100-40:8", "h100:8"):
        fit = fit_of("camelidae-8x7b", gpu, "pesc")
        assert fit.best is not None
        assert fit.best.need.total <= fit.usable
        if fit.fits:
            assert fit.best.speed.tokens_per_second >= fit.as_set.speed.tokens_per_second


def test_zero_3_is_recommended_where_2_does_not_fit():
    loaded = load_recipe("camelidae-8x7b")
    fit = fit_recipe(loaded, KNOWN_BASES["llama-2-70b"], question("a100-40:2"), ["qlora"])[0]
    assert not fit.fits
    assert fit.best is not None
    assert (fit.best.layout.zero_stage, fit.best.layout.checkpointing) == (3, "full")


def test_where_nothing_fits_it_says_what_would():
    fit = fit_of("camelidae-8x34b", "rtx4090:1", "pesc")
    assert (fit.best, fit.largest, fit.fits) == (None, 0, False)
    for gpu in fit.instead:
        assert fit_of("camelidae-8x34b", gpu, "pesc").best is not None
    assert verdict_of(fit).endswith("would do.")


# ---- speed and cost


@pytest.mark.parametrize(("base", "full", "none"), [("llama-2-7b", 43.1, 29.3), ("llama-2-13b", 82.6, 55.8), ("yi-34b", 214.5, 144.8)])
def test_flops_of_the_dense_control(base, full, none):
    """GFLOPs a token at 2,048 positions in one row; packed rows of 400 attend less, so a little below."""
    run = run_of(base)
    assert flops_per_token(run, "full") / 1e9 == pytest.approx(full, rel=0.06)
    assert flops_per_token(run, "none") / 1e9 == pytest.approx(none, rel=0.06)


@pytest.mark.parametrize(("base", "width", "more"), [("llama-2-7b", 64, 0.0062), ("llama-2-7b", 512, 0.0499), ("yi-34b", 512, 0.0328)])
def test_the_bank_adds_the_flops_that_arithmetic_gives(base, width, more):
    ratio = flops_per_token(run_of(base, PescConfig(adapter_dim=width)), "full") / flops_per_token(run_of(base), "full")
    assert ratio - 1 == pytest.approx(more, rel=0.1)  # the routers too


def test_the_assumed_range_holds_published_rates():
    """NeMo, bf16 LoRA of Llama-3-8B without recomputation: 12,473 tokens/s on an H100."""
    run = run_of("llama-3-8b", method="lora", quantization="none", lora={"rank": 16})
    low, high = tokens_per_second(run, Layout(1, 2, "none", 4), DEVICES["h100"])
    assert low < 12_473 < high


def test_larger_micro_batches_unpack_the_base_less_often():
    run = run_of("llama-2-7b")
    small, large = (tokens_per_second(run, Layout(1, 2, "full", blocks), DEVICES["h200"]) for blocks in (1, 8))
    assert large > small


def test_a_measured_rate_and_a_price_replace_the_assumed():
    one_epoch = ["train.epochs=1", "train.global_batch_size=125"]
    speed = fit_of("camelidae-8x7b", "h200:1", "pesc", *one_epoch, blocks=18_000, measured=10_240.0, price=3.0).as_set.speed
    assert speed.tokens_per_second == (10_240.0, 10_240.0)
    assert speed.hours == pytest.approx((1.0, 1.0))
    assert speed.dollars == pytest.approx((3.0, 3.0))


def test_tokens_are_whole_steps():
    loaded = load_recipe("camelidae-8x7b")
    blocks, source = count_blocks(loaded, None, None)
    tokens = count_tokens(loaded.train, blocks, 2048)
    assert tokens % (128 * 2048) == 0
    assert 0 <= tokens - 520_000 * 400 < 128 * 2048
    assert "guess" in source
    short = load_recipe("camelidae-8x7b", ["train.max_steps=3"])
    assert count_tokens(short.train, count_blocks(short, None, 10**9)[0], 2048) == 3 * 128 * 2048


def test_each_arm_has_the_tokens_of_its_own_steps():
    recipe = load_recipe("camelidae-8x7b", ["arms.qlora.train.max_steps=10"])
    fits = {fit.arm: fit.tokens for fit in fit_recipe(recipe, base_shape(recipe, None, None, None), question("h200:1"))}
    assert fits["qlora"] == 10 * 128 * 2048 < fits["pesc"]


def test_a_batch_that_training_refuses_is_refused():
    with pytest.raises(RecipeError, match="which 8 ranks with micro-batches of 32 cannot share evenly: make it 256"):
        fit_of("camelidae-8x7b", "h200:8", "pesc", "train.micro_batch_size=32")


def test_what_the_store_has_is_read_and_not_guessed(tmp_path, monkeypatch):
    """The base's config.json as it was downloaded, and the blocks that tokenize made."""

    def build(ctx):
        (ctx.out / "config.json").write_text(json.dumps(LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3).to_dict()))
        return BuildResult(metrics={"blocks": 300})

    fake_stages.install(monkeypatch)
    monkeypatch.setattr(fake_stages, "build", build)
    recipe, store = Recipe.model_validate(fake_stages.tiny_recipe_dict(tmp_path)), Store(tmp_path / "store")
    with pytest.raises(RecipeError, match="is not known before it is downloaded"):
        base_shape(recipe, store, None, None)
    run_recipe(recipe, store, Selection(until=("tokenize",)))
    assert (base_shape(recipe, store, None, None).hidden, base_shape(recipe, store, None, None).layers) == (64, 3)
    blocks, source = count_blocks(recipe, store, None)
    assert source == "the tokenized mixture"
    assert count_tokens(recipe.train, blocks, recipe.tokenize.context_length) == 3 * 128 * recipe.tokenize.context_length


# ---- the command


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*PESC, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_piped_it_prints_plain_lines(tmp_path):
    done = command("camelidae-8x7b", "--gpu", "h200:1", "--store", str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "┃" not in done.stdout
    labels = {line[2:26].strip() for line in done.stdout.splitlines() if line.startswith("  ")}
    assert {"frozen base", "bank weights", "LoRA weights", "gradients", "optimizer states", "activations", "in all, a GPU"} <= labels
    assert "Fits as set" in done.stdout
    assert "assumption" in done.stdout


def test_json_has_bytes(tmp_path):
    done = command("camelidae-8x34b", "--gpu", "a100-80:16", "--json", "--arm", "pesc", "--store", str(tmp_path / "none"))
    found = json.loads(done.stdout)
    assert found["device"]["count"] == 16
    arm = found["arms"]["pesc"]
    assert sum(arm["as_set"]["bytes"].values()) == arm["as_set"]["total_bytes"]
    assert arm["trained"]["bank"] == 60 * 8 * 2 * 512 * 7168


def test_on_a_terminal_it_is_a_table():
    fit, out = fit_of("camelidae-8x7b", "h200:1", "pesc"), io.StringIO()
    print_fits("camelidae-8x7b", [fit], question("h200:1"), Console(file=out, force_terminal=True, width=120))
    assert "┃" in out.getvalue()
    assert as_json("x", [fit], question("h200:1"))["arms"]["pesc"]["fits"] is True


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "h300:1"], "--gpu is 'h300:1': write NAME:COUNT, such as h200:1 or a100-80:16. Names: h200,"),
        (["--gpu", "h200:0"], "there must be at least one"),
        (["--gpu", "h200:3"], "train.global_batch_size is 128, which 3 GPUs cannot share evenly: add train.global_batch_size=129"),
        (["--arm", "base"], "Recipe 'camelidae-8x7b' trains no arm 'base'. It trains: pesc, qlora."),
        (["--shape", "gpt-5"], "--shape is 'gpt-5': choose one of llama-2-7b,"),
        (["--tokens-per-second", "0"], "--tokens-per-second is 0, but must be above 0"),
    ],
)
def test_wrong_usage_is_a_sentence(arguments, sentence, tmp_path):
    done = command("camelidae-8x7b", *arguments, "--store", str(tmp_path / "none"))
    assert done.returncode == 1
    assert sentence in done.stderr


def test_a_base_that_nobody_knows_is_asked_for():
    loaded = load_recipe("camelidae-8x7b", ["sources.model.uri=hub:somebody/something@main"])
    with pytest.raises(RecipeError, match="is not known before it is downloaded"):
        base_shape(loaded, None, None, None)
    assert base_shape(loaded, None, "yi-34b", None) == KNOWN_BASES["yi-34b"]


def test_nothing_of_it_imports_torch():
    code = "import sys, pesc.cli, pesc.fit.table, pesc.fit.planner, pesc.train.memory.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
