"""What the routers of a sparse model do: who works, who rests, who works together, and whether experts take to a domain.

    pesc routing 'demo:merge[pesc]' --out routing          the model's own held-out rows, by domain
    routing[ARM] of a recipe                               the same as a cached action, shown on the report page

Map: rows (token ids with their domain, from packed blocks or texts), loading (a model for reading), counts (one pass: who was chosen for which
token), measures (load, entropy, dead experts, co-activation, specialisation), agreement (two checkpoints on the same tokens), results (the schema of
routing.json), plots, tables (text), stage (`routing[ARM]`), commands (`pesc routing`), config.

Promises
- Every number is a count, or follows from counts: one token on one layer makes K choices, in the router's order of preference.
- Rows run one by one, as they were before packing; nothing is drawn but the permutations, from a named seed.
- Specialisation is tested by permuting the domains of whole rows: tokens of one row are not independent of one another.

Never: compares two models on different tokens; calls an expert specialised by mutual information alone, which is above 0 for any finite sample.

Pitfalls
- A router that was never trained separates domains too, since their hidden states differ. Compare with the model before training
  (`pesc routing 'demo:merge[pesc]' 'demo:upcycle[pesc]'`).
- Domains of short rows have a larger share of chat-template tokens, which all domains route alike: `tokens: answers` leaves them out.
- `plots` and `results` import neither torch nor pesc.data nor pesc.train, because `pesc.evaluate.report` reads them.
"""
