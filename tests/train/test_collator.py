from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pesc.train.blocks import PackedBlocks
from pesc.train.collator import NO_LOSS, Collator, OrderedBlocks
from pesc.train.order import BlockOrder
from tests.launch.test_supervise import alive
from tests.train import tiny


def block(*rows: list[int], supervised_from: int = 1) -> dict:
    labels = [[NO_LOSS if index < supervised_from else token for index, token in enumerate(row)] for row in rows]
    return {
        "input_ids": np.concatenate(rows),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate([np.arange(len(row)) for row in rows]),
        "position": 0,
    }


def test_targets_are_the_next_tokens_within_a_row():
    batch = Collator()([block([5, 6, 7], [8, 9])])
    assert batch["targets"].tolist() == [[6, 7, NO_LOSS, 9, NO_LOSS]]


def test_the_first_token_of_a_packed_row_is_nobodys_successor_even_if_labelled():
    batch = Collator()([block([5, 6, 7], [8, 9], supervised_from=0)])
    assert batch["targets"].tolist() == [[6, 7, NO_LOSS, 9, NO_LOSS]]


def test_padding_is_marked_and_never_learned():
    batch = Collator(pad_id=3)([block([5, 6, 7], [8, 9]), block([1, 2])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 3, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["targets"].tolist()[1] == [2, NO_LOSS, NO_LOSS, NO_LOSS, NO_LOSS]
    assert batch["valid"].tolist() == [[True] * 5, [True, True, False, False, False]]


def test_flattening_keeps_rows_apart():
    items = [block([5, 6, 7], supervised_from=0), block([1, 2], supervised_from=0)]
    batch = Collator(flatten=True)(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["targets"].tolist() == [[6, 7, NO_LOSS, 2, NO_LOSS]]
    assert batch["valid"].all()


def test_an_item_is_the_block_of_its_position(blocks_dir):
    blocks, order = PackedBlocks(blocks_dir), BlockOrder(23, 7)
    data = OrderedBlocks(blocks, order, 50)
    assert len(data) == 50
    item = data[30]
    assert item["position"] == 30
    assert item["input_ids"].tolist() == blocks[order.block_at(30)]["input_ids"].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_packed_rows_do_not_see_one_another(kind, attention, request):
    """Logits of packed rows equal those of each row alone, with padding and without, and depend on nothing in another row."""
    from transformers import AutoModelForCausalLM

    import pesc.models

    pesc.models.register()
    directory = request.getfixturevalue(f"{kind}_dir")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()
    random = np.random.default_rng(1)
    rows = [random.integers(tiny.VOCABULARY, size=length).tolist() for length in (7, 12, 5)]
    collate = Collator()

    def logits(batch):
        with torch.no_grad():
            return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    alone = torch.cat([logits(collate([block(row)]))[0] for row in rows])
    packed = collate([block(*rows), block(random.integers(tiny.VOCABULARY, size=40).tolist())])
    torch.testing.assert_close(logits(packed)[0, :24], alone, atol=2e-5, rtol=1e-4)

    other = [random.integers(tiny.VOCABULARY, size=7).tolist(), *rows[1:]]
    changed = logits(collate([block(*other)]))[0]
    torch.testing.assert_close(changed[7:], logits(collate([block(*rows)]))[0, 7:], atol=0, rtol=0)
    assert not torch.allclose(changed[:7], alone[:7], atol=1e-3)


LOADING = """
import os, signal, sys, time
import torch
from pesc.train.collator import loading
signal.signal(signal.SIGTERM, lambda *_: print("told to stop", flush=True))  # as a rank does, which ends its step first
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, n):
        time.sleep(0.05)
        return torch.tensor(n)
settings = loading("cuda", 2) | {"pin_memory": False}
for batch in torch.utils.data.DataLoader(Slow(), batch_size=1, **settings):
    if batch.item() == 1:
        (worker,) = open(f"/proc/self/task/{os.getpid()}/children").read().split()
        print("worker", worker, flush=True)
        if sys.argv[1] == "group": os.killpg(0, signal.SIGTERM)
        else: os.kill(os.getpid(), signal.SIGKILL)
    print("batch", batch.item(), flush=True)
"""


def run_loading(how: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", LOADING, how], capture_output=True, text=True, start_new_session=True, timeout=120)


def test_a_stop_of_the_group_leaves_the_loading_process_to_its_rank():
    """torchrun signals the whole group of a rank; a loading process that died of it would fail the step that is to be saved."""
    done = run_loading("group")
    assert done.returncode == 0, done.stderr
    assert "told to stop" in done.stdout
    assert "batch 5" in done.stdout


def test_the_loading_process_does_not_outlive_its_rank():
    done = run_loading("kill")
    worker = int(done.stdout.split("worker ")[1].split()[0])
    end = time.monotonic() + 10
    while alive(worker):
        assert time.monotonic() < end
        time.sleep(0.05)
