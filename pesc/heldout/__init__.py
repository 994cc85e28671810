"""The loss of an arm's final model on the rows that were held out: for every arm, dense or sparse, row by row.

    heldout[ARM] of a recipe (`heldout.enabled`)        a cached action, read by the report's pre-registered questions

Map: config, stage (`heldout[ARM]`), losses (the pass over the rows), results (the schema of heldout.json).

What it is beside the looks of `train`: those are of the model as it is trained (4-bit base, unmerged) and by domain; this is of the model
that is delivered, merged, and by row, so that two arms can be compared on the very same rows.

Pitfall: `results` imports neither torch nor pesc.data nor pesc.train, because `pesc.evaluate` reads it.
"""
