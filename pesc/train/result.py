"""What a finished run leaves: the LoRA adapter, the bank with the routers, and the record of the run.

    adapter/adapter_config.json, adapter_model.safetensors   loads with peft.PeftModel.from_pretrained
    bank.safetensors                                         sparse models: model.layers.{l}.mlp.{adapters.down, adapters.up, router.weight},
                                                             and, where the model has them, adapters.shared_{down,up}, router.bias_steps
    weights.safetensors                                      method upcycle-full, instead of both: every weight, named as Mixtral checkpoints are
    training.json                                            settings, what was trained, facts that do not depend on time or place
    history.jsonl                                            one line an optimizer step
    held_out.jsonl                                           where tokenize left held-out blocks: one line a look, the loss by domain

Bytes depend on the weights and the settings alone: no paths, no versions, no order of a set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pesc.models import mixtral
from pesc.models.mixtral import WEIGHTS_NAME
from pesc.train.config import TrainConfig
from pesc.train.modeling import PEFT_PREFIX, TrainableGroup, group_of, peft_config, selection_biases, trainable_parameters

_ADAPTER_NAME = ".default"
_NOT_KEPT = ("base_model_name_or_path", "revision", "peft_version")


def gather_trained(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """Everything trained, by parameter name, on the CPU; {} where `keep` is False.

    All ranks must call it: ZeRO-3 gathers each tensor from all of them.
    """
    from deepspeed.runtime.zero import GatheredParameters

    trained = {}
    for name, parameter in trainable_parameters(model):
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if keep:
                trained[name] = parameter.detach().cpu().clone().contiguous()
    if keep:
        trained |= {name: bias.detach().cpu().clone() for name, bias in selection_biases(model)}
    return trained


def write_result(
    folder: Path,
    trained: dict[str, torch.Tensor],
    config: TrainConfig,
    groups: Sequence[TrainableGroup],
    facts: dict[str, Any],
    history: Sequence[dict],
    held_out: Sequence[dict] = (),
) -> None:
    """Write the stage's output into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    if config.method == "upcycle-full":
        folder.mkdir(parents=True)
        weights = {name: tensor.contiguous() for name, tensor in mixtral.to_published(trained).items()}
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        _write_adapter(folder, trained, config)
    _write_json(
        folder / "training.json", {"config": config.model_dump(mode="json"), "trainable": [asdict(g) for g in groups], "facts": facts}
    )
    _write_lines(folder / "history.jsonl", history)
    if held_out:
        _write_lines(folder / "held_out.jsonl", held_out)


def _write_adapter(folder: Path, trained: dict[str, torch.Tensor], config: TrainConfig) -> None:
    """LoRA in PEFT's own form; bank and routers beside it."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    lora = {name.replace(_ADAPTER_NAME, ""): tensor for name, tensor in trained.items() if group_of(name) == "lora"}
    bank = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in trained.items() if group_of(name) != "lora"}
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_json(adapter / "adapter_config.json", _adapter_config(config))
    if bank:
        save_file(bank, folder / "bank.safetensors", metadata={"format": "pt"})


def _adapter_config(config: TrainConfig) -> dict[str, Any]:
    fields = peft_config(config).to_dict()
    for name in _NOT_KEPT:
        fields.pop(name, None)
    fields |= {"inference_mode": True, "base_model_name_or_path": None}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
