"""`routing[ARM]`: what the routers of a sparse arm do on the held-out rows.

    inputs   model (a sparse Hugging Face directory), blocks (a tokenize object)
    out      routing.json (pesc.routing.results.RoutingResult)

A tokenize object without held-out blocks makes a result that says so, and no failure: the benchmarks beside it are worth keeping.
"""

from __future__ import annotations

import time

from pesc.routing.config import RoutingConfig
from pesc.routing.results import RoutingResult, write_result
from pesc.routing.rows import has_held_out, read_blocks
from pesc.stage import BuildResult, StageContext

NO_ROWS = "the mixture holds no rows out (mix.held_out), or they are too few"


def build(ctx: StageContext) -> BuildResult:
    """Count and measure.  Raises ModelError or DataError."""
    config: RoutingConfig = ctx.config
    started = time.perf_counter()
    if not has_held_out(ctx.inputs["blocks"]):
        write_result(ctx.out, RoutingResult(tokens=config.tokens, hole=NO_ROWS))
        return BuildResult(metrics={"rows": 0})
    from pesc.routing.counts import observe
    from pesc.routing.loading import load_model
    from pesc.routing.measures import measure

    rows = read_blocks(ctx.inputs["blocks"], config.tokens, config.blocks_per_domain)
    model = load_model(ctx.inputs["model"], ctx.address, config.dtype, ctx.execution.device)
    result = measure(observe(model, rows, ctx.address, ctx.progress), config)
    write_result(ctx.out, result)
    metrics = {
        "rows": result.num_rows, "tokens": result.num_tokens, "layers": len(result.layers), "device": str(model.device),
        "dead": sum(len(entry.dead) for entry in result.layers), "busiest": max(entry.busiest for entry in result.layers),
        "specialisation": result.overall.excess if result.overall else None, "p": result.overall.p if result.overall else None,
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip
    return BuildResult(metrics=metrics)
