"""`heldout[ARM]`: the loss of an arm's final model on each held-out row.

inputs   model (a Hugging Face directory, dense or sparse), blocks (a tokenize object)
out      heldout.json (pesc.heldout.results.HeldOutResult)
"""

from __future__ import annotations

import time

from pesc.heldout.config import HeldOutConfig
from pesc.heldout.results import write_result
from pesc.routing.rows import read_blocks
from pesc.stage import BuildResult, StageContext


def build(ctx: StageContext) -> BuildResult:
    """Measure.  Raises DataError for a mixture that holds no rows out, ModelError for a model that cannot be loaded or has diverged."""
    config: HeldOutConfig = ctx.config
    started = time.perf_counter()
    rows = read_blocks(ctx.inputs["blocks"], "answers", config.blocks_per_domain)
    from pesc.heldout.losses import measure
    from pesc.routing.loading import load_model

    model = load_model(ctx.inputs["model"], ctx.address, config.dtype, ctx.execution.device)
    result = measure(model, rows, ctx.address, ctx.progress)
    write_result(ctx.out, result)
    metrics = {
        "rows": len(result.rows), "tokens": sum(row.tokens for row in result.rows), "loss": result.mean,
        "domains": {domain: result.loss(domain) for domain in result.domains}, "device": str(model.device),
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip
    return BuildResult(metrics=metrics)
