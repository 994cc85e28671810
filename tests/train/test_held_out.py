"""The loss on held-out blocks: torch's own cross-entropy over the same tokens, whatever the ranks, and without a trace in the weights."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch

from pesc.errors import InterruptedStageError
from pesc.train.blocks import HELD_OUT, PackedBlocks
from pesc.train.collator import NO_LOSS, Collator
from pesc.train.held_out import HeldOut, open_held_out
from pesc.train.stage import build
from tests.train import tiny

DOMAINS = ("code", "maths", "code", "chat", "code")


def add_held_out(folder, domains=DOMAINS):
    """Held-out blocks with domains, beside some training blocks."""
    with pa.ipc.open_stream(tiny.write_blocks(folder / "made", len(domains), seed=9) / "blocks-00000.arrow") as reader:
        first = reader.read_all()
    with pa.ipc.open_stream(folder / "made" / "blocks-00001.arrow") as reader:
        table = pa.concat_tables([first, reader.read_all()])
    table = table.append_column("domain", pa.array(domains))
    with pa.OSFile(str(folder / "heldout-00000.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return folder


@pytest.fixture(scope="module")
def blocks_with_held_out(tmp_path_factory):
    return add_held_out(tiny.write_blocks(tmp_path_factory.mktemp("blocks"), 23))


def fake_sums(items):
    """A 'loss' that tells which block was read: the sum of its tokens."""
    return torch.tensor(float(sum(item["input_ids"].sum() for item in items)))


def measure(folder, world_size, **changes):
    """What all ranks find together, run one after the other."""
    blocks, found = PackedBlocks(folder, HELD_OUT), []
    calls = []
    totals = torch.zeros(3, dtype=torch.float64)
    for rank in range(world_size):
        held_out = HeldOut(blocks, tiny.settings(**changes), 40, rank, world_size)
        counted = []
        held_out.measure(lambda items, c=counted: c.append(1) or fake_sums(items), totals.add_, torch.device("cpu"))
        calls.append(len(counted))
    last = HeldOut(blocks, tiny.settings(**changes), 40, world_size - 1, world_size)
    found = last.measure(fake_sums, lambda sums: sums.copy_(totals), torch.device("cpu"))
    return found, calls


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("micro", [1, 2])
def test_any_number_of_ranks_finds_the_same_with_equally_many_passes(blocks_with_held_out, world_size, micro):
    found, calls = measure(blocks_with_held_out, world_size, micro_batch_size=micro)
    alone, _ = measure(blocks_with_held_out, 1)
    assert found == alone
    assert len(set(calls)) == 1
    assert list(found["domains"]) == ["chat", "code", "maths"]


def test_a_domain_is_read_up_to_the_cap(blocks_with_held_out):
    found, calls = measure(blocks_with_held_out, 1, evaluate_blocks=2)
    everything, _ = measure(blocks_with_held_out, 1)
    assert calls == [4]
    assert found["domains"]["code"]["tokens"] < everything["domains"]["code"]["tokens"]
    assert found["domains"]["chat"] == everything["domains"]["chat"]


def test_looks_are_at_the_start_the_end_and_every_tenth_unless_the_settings_say_otherwise(blocks_with_held_out):
    blocks = PackedBlocks(blocks_with_held_out, HELD_OUT)

    def due(steps, **changes):
        held_out = HeldOut(blocks, tiny.settings(**changes), steps, 0, 1)
        return [step for step in range(steps + 1) if held_out.is_due(step)]

    assert due(25) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert due(3) == [0, 1, 2, 3]
    assert due(10, evaluate_every_steps=4) == [0, 4, 8, 10]


def test_earlier_objects_and_settings_without_looks_have_no_held_out_loss(blocks_dir, blocks_with_held_out):
    assert open_held_out(blocks_dir, tiny.settings(), 4, 0, 1) is None
    assert open_held_out(blocks_with_held_out, tiny.settings(evaluate_blocks=0), 4, 0, 1) is None


# ---- real ranks

SEEN = []
"""Progress of the run that `looked`."""


def run(folder, model, blocks, execution=None, on_progress=lambda _p: None, **changes):
    ctx = tiny.make_context(folder, model, blocks, tiny.settings(**changes), execution, on_progress)
    build(ctx)
    return ctx


def looks(ctx):
    return [json.loads(line) for line in (ctx.out / "held_out.jsonl").read_text().splitlines()]


def events(ctx):
    return [json.loads(line) for line in (ctx.work / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def looked(tmp_path_factory, sparse_dir, blocks_with_held_out):
    return run(tmp_path_factory.mktemp("looked"), sparse_dir, blocks_with_held_out, on_progress=SEEN.append, balance={"jitter": 0.05})


@pytest.mark.slow
def test_the_first_look_is_the_untrained_models_loss_by_torchs_cross_entropy(looked, sparse_dir, blocks_with_held_out):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sparse_dir, dtype=torch.float32).eval()
    blocks = PackedBlocks(blocks_with_held_out, HELD_OUT)
    first = looks(looked)[0]
    assert first["step"] == 0
    for domain, numbers in blocks.domains.items():
        total, tokens = 0.0, 0
        for number in numbers:
            batch = Collator()([{**blocks[number], "position": 0}])
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            target = batch["targets"].flatten()
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, ignore_index=NO_LOSS, reduction="sum").item()
            tokens += int((target != NO_LOSS).sum())
        assert first["domains"][domain] == {"loss": pytest.approx(total / tokens, rel=1e-5), "tokens": tokens}


@pytest.mark.slow
def test_looking_leaves_no_trace_in_the_weights(looked, tmp_path, sparse_dir, blocks_with_held_out):
    blind = run(tmp_path, sparse_dir, blocks_with_held_out, balance={"jitter": 0.05}, evaluate_blocks=0)
    assert not (blind.out / "held_out.jsonl").exists()
    for name in ("bank.safetensors", "adapter/adapter_model.safetensors", "history.jsonl"):
        assert (blind.out / name).read_bytes() == (looked.out / name).read_bytes(), name


@pytest.mark.slow
def test_zero_3_finds_the_same_losses(looked, tmp_path, sparse_dir, blocks_with_held_out):
    sharded = run(tmp_path, sparse_dir, blocks_with_held_out, {"zero_stage": 3, "gradient_checkpointing": "full"}, balance={"jitter": 0.05})
    for line, expected in zip(looks(sharded), looks(looked), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_a_stopped_run_looks_when_it_continues_and_events_tell_of_both(looked, tmp_path, sparse_dir, blocks_with_held_out):
    def stop(progress):
        if progress.message == "training" and progress.done == 2:
            (tmp_path / "work" / "STOP").touch()

    with pytest.raises(InterruptedStageError):
        run(tmp_path, sparse_dir, blocks_with_held_out, on_progress=stop, balance={"jitter": 0.05})
    again = run(tmp_path, sparse_dir, blocks_with_held_out, balance={"jitter": 0.05})
    for name in ("bank.safetensors", "history.jsonl", "held_out.jsonl", "training.json"):
        assert (again.out / name).read_bytes() == (looked.out / name).read_bytes(), name
    told = events(again)
    assert [e["step"] for e in told if e["event"] == "step"] == [1, 2, 3, 4]
    assert [e["step"] for e in told if e["event"] == "evaluation"] == [0, 1, 2, 3, 4]
    assert [e["event"] for e in told].count("start") == 2
    assert told[-1]["event"] == "end"
    step = next(e for e in told if e["event"] == "step" and e["step"] == 2)
    assert step["seconds"] > 0
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / step["seconds"])
    assert "mfu" not in step  # a CPU has no peak in the table


@pytest.mark.slow
def test_progress_carries_the_held_out_losses_and_the_expert_load(looked):
    last = [p for p in SEEN if p.message == "training"][-1].fields
    assert {"loss", "lr", "balance", "tokens_per_second", "held_out/code", "expert_max", "expert_min", "expert_entropy"} <= set(last)
