"""A flow process that trains through the real store: `python -m tests.train.survivor ROOT MODEL BLOCKS STEPS`.

Everything before `train` hands out ready directories; `train` is the real one.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from pesc import pipeline
from pesc.plan import Selection
from pesc.recipe import _merge, recipe_from_dict
from pesc.run import run_recipe
from pesc.stage import BuildResult, StageContext
from pesc.store import Store
from tests.fake_stages import tiny_recipe_dict

READY = {"upcycle": "PESC_TEST_MODEL", "tokenize": "PESC_TEST_BLOCKS"}
TRAIN = {
    "quantization": "nf4",
    "compute_dtype": "bfloat16",
    "optimizer": "paged_adamw_8bit",
    "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.2},
    "learning_rate": 1e-3,
    "global_batch_size": 4,
    "seed": 7,
}
EXECUTION = {"device": "cpu", "num_processes": 2, "gradient_checkpointing": "none", "save_every_steps": 2}


def hand_out(ctx: StageContext) -> BuildResult:
    """Copy a ready directory, or write a word."""
    if variable := READY.get(ctx.address.partition("[")[0]):
        shutil.copytree(os.environ[variable], ctx.out, dirs_exist_ok=True)
    else:
        (ctx.out / "data.json").write_text('"nothing"')
    return BuildResult()


def main(root: Path, model: str, blocks: str, steps: int) -> None:
    """Build up to train[pesc]."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    os.environ |= {"PESC_TEST_MODEL": model, "PESC_TEST_BLOCKS": blocks}
    for name, stage in list(pipeline._BY_NAME.items()):
        if name != "train":
            pipeline._BY_NAME[name] = replace(stage, builder="tests.train.survivor:hand_out", isolated=False)
    changes = {"train": {**TRAIN, "max_steps": steps, "epochs": float(steps)}, "execution": EXECUTION}
    recipe = recipe_from_dict(_merge(tiny_recipe_dict(root / "sources"), changes))
    run_recipe(recipe, Store(root / "store"), Selection(until=("train[pesc]",)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
