"""The host never waits for the device within a micro-batch.

Shown on the meta device, whose tensors have no values: whoever asks for one (`.item()`, `if tensor`, `nonzero`, a boolean mask, `.cpu()`) gets
an error; copies to it that would not run in the background are refused too.  And on CUDA, where there is one, by torch's own watch.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pesc.moe.layer import set_dispatch
from pesc.stage import Execution
from pesc.train import head
from pesc.train.blocks import PackedBlocks
from pesc.train.collator import Collator, OrderedBlocks
from pesc.train.job import Job
from pesc.train.modeling import load_trainable
from pesc.train.order import BlockOrder
from pesc.train.packed_rows import describe_rows, model_inputs, rows_told
from pesc.train.trainer import PescTrainer
from tests.train import tiny

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default)
_INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Waits(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for the meta device, were it a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _COPIES and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
            source = args[1] if func is aten.copy_.default else args[0]
            target = args[0].device if func is aten.copy_.default else kwargs.get("device") or source.device
            if source.ndim and {source.device.type, torch.device(target).type} == {"cpu", "meta"}:
                raise Waits(f"{func} from {source.device} to {target}")
        if func in _INDEXED and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            raise Waits(f"{func} with a boolean mask")
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            raise Waits(f"{func}: {error}") from error


def make_trainer(root: Path, model, config, blocks: Path, device: str, monkeypatch, checkpointing: str = "none") -> PescTrainer:
    """A trainer without DeepSpeed, whose backward pass is not this package's."""
    from transformers import TrainingArguments

    settings = TrainingArguments(
        output_dir=str(root), max_steps=2, per_device_train_batch_size=config.micro_batch_size, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    monkeypatch.setitem(vars(settings), "_setup_devices", torch.device(device))
    execution = Execution.model_validate({"device": "cpu", "num_processes": 1, "gradient_checkpointing": checkpointing})
    job = Job("train[tiny]", config, execution, root, blocks, root, device.partition(":")[0], 2, logging.WARNING)
    read = PackedBlocks(blocks)
    data = OrderedBlocks(read, BlockOrder(len(read), config.seed), 2 * config.global_batch_size)
    silent: Any = SimpleNamespace(beat=lambda _doing: None)
    trainer = PescTrainer(model, settings, data, job, silent, silent, silent)
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss, **_: loss.backward())
    return trainer


@pytest.fixture
def meta_trainer(tmp_path, blocks_dir, request, monkeypatch):
    """A factory: the trainer of a tiny model on the meta device."""
    monkeypatch.setattr(head, "_gives_its_heads_logits", lambda *_: True)  # as it does; the meta device cannot tell

    def make(method: str = "pesc", attention: str = "sdpa", dispatch: str = "dense", checkpointing: str = "none") -> PescTrainer:
        balance = {"z_coefficient": 0.1, "jitter": 0.01} if method == "pesc" else {}
        config = tiny.settings(method=method, compute_dtype="bfloat16", micro_batch_size=2, balance=balance)
        directory = request.getfixturevalue("sparse_dir" if method == "pesc" else "dense_dir")
        model = load_trainable(directory, config, "cpu", checkpointing).to("meta")
        set_dispatch(model, dispatch)
        model.config._attn_implementation = attention
        return make_trainer(tmp_path, model, config, blocks_dir, "meta", monkeypatch, checkpointing)

    return make


def micro_batches(trainer: PescTrainer) -> tuple[list[dict], torch.Tensor]:
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)


def train_all(trainer: PescTrainer) -> None:
    batches, supervised = micro_batches(trainer)
    with NoWaiting():
        for batch in batches:
            trainer.training_step(trainer.model, batch, supervised)
    assert all(parameter.grad is not None for parameter in trainer.model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dispatch", ["dense", "grouped"])
def test_a_micro_batch_never_waits_for_the_device(meta_trainer, dispatch):
    train_all(meta_trainer("pesc", dispatch=dispatch))


def test_neither_does_the_dense_control(meta_trainer):
    train_all(meta_trainer("lora"))


@pytest.fixture
def flash(monkeypatch):
    """Flash attention's variable-length kernel, each row by torch's; any other way to run it is an error."""
    from transformers import modeling_flash_attention_utils as flash_utils

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):
        if q.is_meta:
            return q * k.mean() * v.mean()
        rows = [part.transpose(0, 1) for part in (q, k, v)]
        bounds = cu_seqlens_q.tolist()
        assert bounds == cu_seqlens_k.tolist()
        outs = [
            F.scaled_dot_product_attention(*(part[:, start:end] for part in rows), is_causal=True, scale=softmax_scale, enable_gqa=True)
            for start, end in pairwise(bounds)
        ]
        return torch.cat(outs, dim=1).transpose(0, 1)

    def forbidden(*_args, **_kwargs):
        raise Waits("flash attention looked for the rows itself")

    functions = ((forbidden, varlen, None, forbidden, forbidden), (lambda **given: {"softmax_scale": given["softmax_scale"]}, dict))
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_: functions)
    monkeypatch.setattr(flash_utils, "_is_packed_sequence", forbidden)


def test_neither_does_flash_attention_with_packed_rows(meta_trainer, flash):
    train_all(meta_trainer(attention="flash_attention_2"))


@pytest.mark.parametrize(
    ("how", "wait"),
    [
        ("item", lambda loss, _: loss.item()),
        ("float", lambda loss, _: float(loss.detach())),
        ("if", lambda loss, _: bool(loss > 0)),
        ("tolist", lambda _, inputs: inputs["valid"].tolist()),
        ("cpu", lambda _, inputs: inputs["valid"].cpu()),
        ("nonzero", lambda _, inputs: inputs["valid"].nonzero()),
        ("mask", lambda _, inputs: inputs["input_ids"][inputs["valid"]]),
        ("mask set", lambda _, inputs: inputs["input_ids"].__setitem__(inputs["valid"], inputs["position_ids"][0, 0])),
        ("blocking copy", lambda loss, _: torch.ones(3).to(loss.device)),
    ],
)
def test_a_wait_in_the_step_would_be_seen(meta_trainer, monkeypatch, how, wait):
    trainer = meta_trainer()
    computed = trainer.compute_loss

    def waiting(model, inputs, **more):
        loss = computed(model, inputs, **more)
        wait(loss, inputs)
        return loss

    monkeypatch.setattr(trainer, "compute_loss", waiting)
    with pytest.raises((Waits, RuntimeError, NotImplementedError)):
        train_all(trainer)


def test_a_mask_that_is_looked_for_would_be_seen(meta_trainer, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("pesc.train.head.rows_told", lambda _packed: nullcontext())
    with pytest.raises((Waits, RuntimeError, NotImplementedError)):
        train_all(meta_trainer())


# ---- what the attention is told is what it would have found


POSITIONS = [[0, 1, 2, 3, 0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]]
ONE_ROW = [list(range(10)), list(range(10))]


@pytest.mark.parametrize("positions", [POSITIONS, ONE_ROW])
def test_masks_are_those_that_transformers_makes_by_itself(positions):
    from transformers import masking_utils

    given = torch.tensor(positions)
    found = masking_utils.find_packed_sequence_indices(given)
    with rows_told(describe_rows(given.numpy(), flatten=False)["packed"]):
        told = masking_utils.find_packed_sequence_indices(given)
    assert (told is None) == (found is None)
    assert found is None or torch.equal(told, found)
    assert masking_utils.find_packed_sequence_indices.__module__ == "transformers.masking_utils"


@pytest.mark.parametrize("positions", [*POSITIONS, ONE_ROW[0], [0]])
def test_bounds_are_those_that_transformers_finds(positions):
    from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

    told = describe_rows(np.array([positions]), flatten=True)
    (q, k), (longest_q, longest_k) = prepare_fa_kwargs_from_position_ids(torch.tensor([positions]))
    assert told["cu_seq_lens_q"].dtype == q.dtype == torch.int32
    assert (told["cu_seq_lens_q"].tolist(), told["cu_seq_lens_k"].tolist()) == (q.tolist(), k.tolist())
    assert (told["max_length_q"], told["max_length_k"]) == (int(longest_q), int(longest_k))


def test_flash_attention_gives_packed_rows_the_logits_of_torchs(sparse_dir, blocks_dir, flash):
    from transformers import AutoModelForCausalLM

    import pesc.models

    pesc.models.register()
    model = AutoModelForCausalLM.from_pretrained(sparse_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    read = PackedBlocks(blocks_dir)
    items = [{**read[number], "position": number} for number in (3, 4)]

    def logits(flatten: bool) -> torch.Tensor:
        batch = Collator(flatten=flatten)(items)
        model.config._attn_implementation = "flash_attention_2" if flatten else "sdpa"
        with torch.no_grad(), rows_told(batch["packed"]):
            return model(**model_inputs(batch), use_cache=False).logits[batch["valid"]]

    torch.testing.assert_close(logits(True), logits(False), atol=2e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_cuda_sees_no_wait_in_a_micro_batch(tmp_path, sparse_dir, blocks_dir, quantization, monkeypatch):
    """After one micro-batch, in which `auto` measures and libraries set themselves up."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = tiny.settings(quantization=quantization, compute_dtype="bfloat16", micro_batch_size=2)
    model = load_trainable(sparse_dir, config, "cuda:0", "full")
    set_dispatch(model, "auto")
    trainer = make_trainer(tmp_path, model, config, blocks_dir, "cuda:0", monkeypatch, "full")
    batches, supervised = micro_batches(trainer)
    trainer.training_step(trainer.model, batches[0], supervised)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(trainer.model, batches[1], supervised)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    assert all(parameter.grad is not None for parameter in trainer.model.parameters() if parameter.requires_grad)
