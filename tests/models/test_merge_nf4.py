"""A merge into NF4: what transformers loads in 4 bit is PEFT's own merge, quantised; what the quantisation did is said, and wrong ones are refused."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pesc.models
from pesc import cli
from pesc.errors import ModelError
from pesc.generate.settings import LoadOptions, Sampling
from pesc.generate.speaker import load_speaker
from pesc.model_argument import find_model
from pesc.models.config import MergeConfig, UpcycleConfig
from pesc.models.export import export_remote_code
from pesc.models.merge import build, read_parts
from pesc.models.merge_nf4 import share_kept, tell_rounding
from pesc.models.merge_write import write_merged
from pesc.models.nf4 import quantize, quantized_weights, restore
from pesc.models.nf4_files import STATE, read_state, weight_specs
from pesc.models.nf4_proof import compare_stored
from pesc.models.proof import encode, prove, read_prompts
from pesc.models.tensor_files import TensorDirectory
from pesc.models.upcycle import count_directory, upcycle_directory
from pesc.stage import StageContext
from tests.models.builders import rewrite_weights, save_blocks, save_dense, save_sparse, save_trained, without

pesc.models.register()

SQUARE = "model.layers.1.self_attn.q_proj.weight"
OTHER_SQUARE = "model.layers.1.self_attn.o_proj.weight"
FFN = "model.layers.{}.mlp.up_proj.weight"
UP, DOWN = "model.layers.1.mlp.adapters.up", "model.layers.1.mlp.adapters.down"
LIGHT = 0.02
"""Factor on the trained B of the light training: LoRA is then some hundredths of a weight, as after a real training."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sparse model, a strong training of it (in fp32) and a light one (in bf16), prompts, and the merge of the strong one."""
    root = tmp_path_factory.mktemp("nf4")
    wide = {"hidden_size": 64, "intermediate_size": 128}  # what bitsandbytes needs on CPUs with bf16 instructions
    dense = save_dense(root / "dense", tie_word_embeddings=True, shard_size="80KB", initializer_range=0.06, **wide)
    save_sparse(dense, root / "sparse")
    save_trained(root / "sparse", root / "strong", quantization="nf4")
    shutil.copytree(root / "strong", root / "light")
    path = root / "light/adapter/adapter_model.safetensors"
    save_file({name: t * LIGHT if ".lora_B." in name else t for name, t in load_file(path).items()}, path, {"format": "pt"})
    for name, dtype in (("strong", "float32"), ("light", "bfloat16")):
        path = root / name / "training.json"
        training = json.loads(path.read_text())
        training["config"]["compute_dtype"] = dtype
        path.write_text(json.dumps(training))
    save_blocks(root / "blocks")
    merge(root, root / "merged", max_shard_bytes=30_000)
    return root


def merge(world, out, training="strong", model="sparse", **settings):
    out.mkdir()
    inputs = {"model": world / model, "adapter": world / training, "blocks": world / "blocks"}
    return build(StageContext("merge[test]", MergeConfig(dtype="nf4", **settings), inputs, out, out.parent / "work"))


def ledger_of(out):
    return {entry["name"]: entry for entry in json.loads((out / "ledger.json").read_text())["tensors"]}


def load(directory):
    """The model as transformers loads it, in fp32: what is not quantised it leaves in the file's bf16, whatever dtype is asked for."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    return model.train()  # bitsandbytes has a coarser kernel for inference on some CPUs; there is no dropout


def logits(model, world):
    with torch.no_grad():
        return torch.cat([model(input_ids=ids).logits[0] for ids in encode(world / "sparse", read_prompts(world / "blocks", 4))])


def test_transformers_loads_pefts_merge_in_4_bit(world):
    """Against PEFT's own merge_and_unload, and bitsandbytes' own quantisation of it."""
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "sparse", dtype=torch.float32), world / "strong/adapter")
    expected = peft.merge_and_unload()
    model = load(world / "merged")
    names = {f"{name}.weight" for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert names == quantized_weights(json.loads((world / "sparse/config.json").read_text()))
    for name in names:
        stored = model.get_parameter(name)
        packed, state = quantize_4bit(expected.get_parameter(name).data, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert (stored.data == packed).float().mean() > 0.999, name
        assert torch.allclose(dequantize_4bit(stored.data, stored.quant_state), dequantize_4bit(packed, state), rtol=1e-5), name
    bank = load_file(world / "strong/bank.safetensors")
    assert all(model.get_parameter(name).equal(tensor.float()) for name, tensor in bank.items())


def test_its_logits_are_those_of_the_proof(world):
    """In fp32, where bitsandbytes' fused kernel rounds nothing that restoring the weights first would not."""
    proof = json.loads((world / "merged/proof.json").read_text())
    reference = AutoModelForCausalLM.from_pretrained(world / "sparse", dtype=torch.float32)
    reference = PeftModel.from_pretrained(reference, world / "strong/adapter")
    for name, tensor in load_file(world / "strong/bank.safetensors").items():
        reference.base_model.model.get_parameter(name).data.copy_(tensor)
    expected, found = logits(reference, world), logits(load(world / "merged"), world)
    relative = ((found - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    assert (found - expected).abs().max().item() == pytest.approx(proof["logits"]["max_difference"], rel=6e-3)  # three digits
    assert relative == pytest.approx(proof["logits"]["relative_rms_difference"], rel=6e-3)
    assert relative == pytest.approx(proof["logits"]["relative_rms_of_rounding"], rel=0.02)
    assert proof["logits"]["relative_rms_beyond_rounding"] <= 0.02
    assert set(proof["routing"]) == {"model.layers.0.mlp.router", "model.layers.1.mlp.router"}


def test_the_ledger_says_what_nf4_did(world):
    ledger, start = ledger_of(world / "merged"), TensorDirectory(world / "sparse")
    assert set(ledger) == set(weight_specs(TensorDirectory(world / "merged")))
    model = load(world / "merged")
    parts = read_parts(world / "sparse", world / "strong", MergeConfig(dtype="nf4"))
    for name in parts.stored_nf4:
        entry, delta = ledger[name], parts.lora.delta(name)
        assert (entry["action"], entry["dtype"], tuple(entry["shape"])) == ("merged", "NF4", start.specs[name].shape)
        stored, before = restore(model.get_parameter(name).data, model.get_parameter(name).quant_state).float(), start.read(name).float()
        assert entry["change"] == pytest.approx((stored - before).norm().item(), rel=1e-3)
        assert entry["rounding"] == pytest.approx((stored - before - delta).norm().item(), rel=1e-3)
        assert entry["kept"] == pytest.approx(((stored - before) * delta).sum().item() / delta.square().sum().item(), rel=1e-3)
    others = [entry for name, entry in ledger.items() if name not in parts.stored_nf4]
    assert {entry["dtype"] for entry in others} == {"BF16"}


def test_every_tensor_lies_at_a_multiple_of_its_width(world):
    """torch views the bytes of a file as they lie."""
    files = sorted((world / "merged").glob("*.safetensors"))
    assert len(files) > 1
    for path in files:
        head = path.read_bytes()
        header = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
        for name, entry in header.items():
            if name != "__metadata__":
                assert entry["data_offsets"][0] % {"F32": 4, "BF16": 2, "U8": 1}[entry["dtype"]] == 0, name
        names = set(header)
        for name in names:
            if name.endswith(STATE):
                weight = name.removesuffix(f".{STATE}")
                assert {weight, f"{weight}.absmax", f"{weight}.nested_absmax", f"{weight}.quant_map"} <= names, (
                    "the parts of a weight stay together"
                )


@pytest.mark.slow
def test_merging_twice_gives_the_same_bytes(world, tmp_path):
    merge(world, tmp_path / "again", max_shard_bytes=30_000)
    for path in (world / "merged").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("shape", "dtype"), [((9, 14), "bfloat16"), ((1024, 520), "bfloat16"), ((33, 50), "float32")], ids=str)
def test_quantising_in_pieces_is_bitsandbytes_own(shape, dtype):
    """A last block that is not full, more than one piece; a block of zeros."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    weight.view(-1)[:64] = 0
    packed, state = quantize(weight, dtype)
    expected, other = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert packed.equal(expected)
    assert state.absmax.equal(other.absmax)
    assert state.offset.equal(other.offset)
    assert state.state2.absmax.equal(other.state2.absmax)
    assert restore(packed, state).equal(dequantize_4bit(expected, other))


def test_a_projection_without_lora_is_stored_as_training_quantised_it(world, tmp_path):
    """Not quantised a second time, which would round it again."""
    save_trained(world / "dense", tmp_path / "some", steps=2, quantization="nf4", target_modules=["q_proj", "down_proj"])
    merge(world, tmp_path / "out", tmp_path / "some", "dense", base="dequantized")
    written, start = TensorDirectory(tmp_path / "out"), TensorDirectory(world / "dense")
    packed, state = quantize_4bit(start.read(FFN.format(0)), blocksize=64, compress_statistics=True, quant_type="nf4")
    assert written.read(FFN.format(0)).equal(packed)
    assert read_state(written, FFN.format(0))["nested_offset"] == state.offset.item()
    assert ledger_of(tmp_path / "out")[FFN.format(0)]["action"] == "copied"
    assert type(load(tmp_path / "out")).__name__ == "LlamaForCausalLM"


# What most of a LoRA is: smaller than half a step.


def test_a_light_lora_is_kept_on_original_weights_and_refused_on_dequantized_ones(world, written, tmp_path):
    kept, _ = share_kept(list(ledger_of(written).values()))
    assert kept > 0.8
    with pytest.raises(ModelError, match=r"NF4 leaves \d+\.\d% of what LoRA changed.*set merge\.base to original"):
        merge(world, tmp_path / "dequantized", "light", base="dequantized")
    assert list((tmp_path / "dequantized").iterdir()) == []


def test_the_user_is_told_how_much_nf4_changes(world, caplog):
    logits = json.loads((world / "merged/proof.json").read_text())["logits"]
    with caplog.at_level(logging.INFO):
        told = tell_rounding(list(ledger_of(world / "merged").values()), logits | {"relative_rms_effect_of_training": 0.01})
    assert told["relative_rms_of_nf4"] == logits["relative_rms_of_rounding"]
    assert 0.9 < told["lora_kept"] < 1.1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training changed them by 0.01" in caplog.text


# What is wrong is refused by name.


def parts_of(world, training="light", **settings):
    config = MergeConfig(dtype="nf4", **settings)
    return read_parts(world / "sparse", world / training, config), config


def check(world, parts, out, config):
    return prove(parts, out, read_prompts(world / "blocks", 2), config)


WRONG_FOLDS = {
    "one LoRA skipped": (lambda lora: {"pairs": without(lora.pairs, FFN.format(1))}, FFN.format(1)),
    "LoRA of two square projections swapped": (
        lambda lora: {"pairs": {**lora.pairs, SQUARE: lora.pairs[OTHER_SQUARE], OTHER_SQUARE: lora.pairs[SQUARE]}},
        OTHER_SQUARE,
    ),
    "the factor taken twice": (lambda lora: {"scaling": lora.scaling**2}, r"model\.layers\.0"),
    "the factor of another rank": (lambda lora: {"scaling": lora.scaling / 2}, r"model\.layers\.0"),
}


@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_a_wrong_fold_is_refused_by_name(world, tmp_path, case):
    """Of a LoRA that moves few codes."""
    mutate, name = WRONG_FOLDS[case]
    parts, config = parts_of(world)
    wrong = dataclasses.replace(parts, lora=dataclasses.replace(parts.lora, **mutate(parts.lora)))
    write_merged(wrong, tmp_path, config)
    with pytest.raises(ModelError, match=rf"The merged {name}"):
        check(world, parts, tmp_path, config)


def other_state(tensors, **changes):
    key = f"{SQUARE}.{STATE}"
    text = json.dumps(json.loads(bytes(tensors[key].tolist())) | changes).encode().ljust(len(tensors[key]))
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)


def flip(tensors, name, place, step):
    tensors[name].view(-1)[place] += step


def drop_expert(tensors):
    tensors[UP][2] = 0
    tensors[DOWN][2] = 0


SPOILT = {
    "one expert dropped": (drop_expert, DOWN),
    "one code off by one": (lambda t: flip(t, SQUARE, 5, 1 if t[SQUARE].view(-1)[5] & 15 < 15 else -1), f"{SQUARE} is not the trained"),
    "one largest off by one": (lambda t: flip(t, f"{SQUARE}.absmax", 3, 1 if t[f"{SQUARE}.absmax"][3] < 255 else -1), rf"{SQUARE}\.absmax"),
    "another mean": (lambda t: other_state(t, nested_offset=0.2), f"{SQUARE}.{STATE} says a mean"),
    "another shape": (lambda t: other_state(t, shape=[16, 64]), SQUARE),
    "another block size": (lambda t: other_state(t, blocksize=128), f"{SQUARE}.{STATE}"),
    "another table": (lambda t: flip(t, f"{SQUARE}.quant_map", 3, 0.01), rf"{SQUARE}\.quant_map"),
    "larger numbers of the largest": (lambda t: t[f"{SQUARE}.nested_absmax"].mul_(1.01), rf"{SQUARE}\.nested_absmax"),
    "a part lost": (lambda t: t.pop(f"{SQUARE}.absmax"), rf"{SQUARE}\.absmax is not U8"),
    "a state lost": (lambda t: t.pop(f"{SQUARE}.{STATE}"), SQUARE),
    "a weight lost": (lambda t: [t.pop(name) for name in list(t) if name.startswith(SQUARE)], f"has lost {SQUARE}"),
    "transposed": (lambda t: t.update({SQUARE: t[SQUARE].view(64, 32).T.reshape(-1, 1)}), SQUARE),
}


@pytest.fixture(scope="module")
def written(world):
    parts, config = parts_of(world)
    (world / "written").mkdir()
    write_merged(parts, world / "written", config)
    check(world, parts, world / "written", config)
    return world / "written"


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_result_is_refused_by_name(world, written, tmp_path, case):
    change, name = SPOILT[case]
    parts, config = parts_of(world)
    shutil.copytree(written, tmp_path / "out")
    rewrite_weights(tmp_path / "out", change)
    with pytest.raises(ModelError, match=name):
        check(world, parts, tmp_path / "out", config)


@pytest.mark.parametrize("field", ["quant_method", "bnb_4bit_quant_type", "llm_int8_skip_modules"])
def test_a_config_that_would_load_otherwise_is_refused(world, written, tmp_path, field):
    parts, config = parts_of(world)
    shutil.copytree(written, tmp_path / "out")
    fields = json.loads((tmp_path / "out/config.json").read_text())
    fields["quantization_config"][field] = "fp4"
    (tmp_path / "out/config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=rf"quantization_config\.{field}"):
        check(world, parts, tmp_path / "out", config)


def test_a_model_trained_in_full_is_refused(world, tmp_path):
    shutil.copytree(world / "strong", tmp_path / "full")
    training = json.loads((tmp_path / "full/training.json").read_text())
    training["config"]["method"] = "upcycle-full"
    (tmp_path / "full/training.json").write_text(json.dumps(training))
    with pytest.raises(ModelError, match=r"set merge\.dtype to bfloat16"):
        merge(world, tmp_path / "out", tmp_path / "full")


def test_a_lora_that_is_not_a_number_is_refused_by_name(world, tmp_path):
    shutil.copytree(world / "strong", tmp_path / "big")
    path = tmp_path / "big/adapter/adapter_model.safetensors"
    save_file({name: t * 3e20 if "q_proj" in name else t for name, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"q_proj\.weight is not a number after the merge"):
        merge(world, tmp_path / "out", tmp_path / "big")


# Whoever reads a model directory can read this one, or says why not.


def test_it_answers_in_a_chat(world):
    place = find_model(str(world / "merged"), world)
    speaker = load_speaker(place, LoadOptions(device="cpu"))
    reply = speaker.answer([{"role": "user", "content": "Why?"}], Sampling(max_new_tokens=3, seed=1))
    assert 0 < reply.tokens <= 3
    with pytest.raises(ModelError, match="are quantised already: leave out --four-bit"):
        load_speaker(place, LoadOptions(device="cpu", four_bit=True))


@pytest.mark.slow
def test_generate_runs_on_it(world):
    done = CliRunner().invoke(cli.app, ["generate", str(world / "merged"), "hello", "--raw", "--max-new-tokens", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_lm_eval_loads_it(world, tmp_path):
    from lm_eval.api.instance import Instance

    from pesc.evaluate.journal import Journal
    from pesc.evaluate.language_model import load_language_model

    journal = Journal(tmp_path / "journal")
    model = load_language_model(world / "merged", device="cpu", dtype="float32", batch_size=2, journal=journal, on_progress=lambda *_: None)
    request = Instance(request_type="loglikelihood", doc={}, arguments=("two and two is", " four"), idx=0)
    assert model.loglikelihood([request])[0][0] < 0


def test_every_code_that_bitsandbytes_chooses_passes(tmp_path):
    """A million largest-of-blocks: one in a thousand lies so near a tie that its kernel for CPUs takes the other neighbour."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    packed, state = quantize(weight, "float32")
    stored = {"w": packed} | {f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    assert compare_stored(TensorDirectory(tmp_path), "w", weight, torch.zeros_like(weight), "float32") <= 1.001


def test_its_parameters_are_counted_as_those_of_the_plain_model(world):
    assert count_directory(world / "merged") == count_directory(world / "sparse")


def test_published_layouts_refuse_it(world, tmp_path):
    arguments = ["export", str(world / "merged"), "--format", "camelidae", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1
    assert "which no published layout is" in " ".join(str(done.exception or done.output).split())
    assert not (tmp_path / "out").exists()


def test_it_is_neither_upcycled_nor_merged_into(world, tmp_path):
    with pytest.raises(ModelError, match="merge into the unquantised model"):
        merge(world, tmp_path / "out", model=world / "merged")
    shutil.copytree(world / "dense", tmp_path / "dense")
    fields, merged = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "dense", world / "merged"))
    (tmp_path / "dense/config.json").write_text(json.dumps(fields | {"quantization_config": merged["quantization_config"]}))
    (tmp_path / "up").mkdir()
    with pytest.raises(ModelError, match="upcycle the unquantised model instead"):
        upcycle_directory(tmp_path / "dense", tmp_path / "up", UpcycleConfig(num_experts=4, adapter_dim=8))


LOADER = """
import sys
sys.modules["pesc"] = None  # an import of it would fail
import torch
from transformers import AutoModelForCausalLM
directory, result = sys.argv[1:]
model, loading = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
assert not any(loading.values()), loading
assert type(model.model.layers[0].mlp.gate_proj).__name__ == "Linear4bit"
with torch.no_grad():
    torch.save(model(torch.tensor([[1, 2, 3, 4]])).logits, result)
"""


@pytest.mark.slow
def test_remote_code_is_exported_as_it_is(world, tmp_path):
    (tmp_path / "exported").mkdir()
    export_remote_code(world / "merged", tmp_path / "exported")
    (tmp_path / "load.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "load.py"), str(tmp_path / "exported"), str(tmp_path / "result.pt")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(world / "merged", dtype=torch.float32)(torch.tensor([[1, 2, 3, 4]])).logits
    assert torch.equal(torch.load(tmp_path / "result.pt", weights_only=True), expected)


def test_a_damaged_one_is_not_exported(world, tmp_path):
    shutil.copytree(world / "merged", tmp_path / "damaged")
    rewrite_weights(tmp_path / "damaged", lambda tensors: tensors.pop(f"{SQUARE}.quant_map"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=rf"{SQUARE} in 4 bit, but .*quant_map"):
        export_remote_code(tmp_path / "damaged", tmp_path / "out")
