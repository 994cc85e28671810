"""From source references to packed training blocks: `download`, `dedup`, `mix`, `tokenize`.

Map
    sources.py        what a reference means; globs; the digest of local files           download.py    fetch and pin one source
    hub.py            files of one commit of the hub, resumed and checked                 url.py         files at fsspec URLs
    gguf.py           a packaged GGUF model -> a Hugging Face directory (child process)
    conversation.py   one conversation schema       formats.py  rows of each known format become it       turns.py  roles, texts, tool calls
    rows.py           rows out of files             streams.py  text files cut into rows on their bytes   json_rows.py, table_rows.py
    shards.py         row files cut into shards that workers read side by side
    functions.py      documented Python functions as code instructions                   text.py        words, and what they are keyed by
    filters/          rows thrown out for what they are                                  exact_dedup.py equal conversations, survival order
    minhash.py        near-duplicates, each verified with the true Jaccard               decontaminate.py  benchmark questions in training rows
                      (benchmark_index.py and its benchmark_items, ngram_table, near_match, vocabulary; contamination_table.py)
    prepare.py        what can be said of a row alone, batch by batch, in workers        row_table.py   keys of all rows as arrays
    dedup.py          decides on those arrays, writes the rows                           ledger.py      what was removed, and why
    semantic.py       an optional report of paraphrases (its model in a child process)
    mixture.py        quotas by domain, drawn with a seed; held-out rows                     allocation.py  places by weight or temperature
    reorder.py        chosen rows of a Parquet file in another order, streamed             card/          the data card: HTML and markdown
    chat.py           chat template -> text with the spans that carry loss               packing.py     best-fit-decreasing bins
    encoding.py       text -> tokens and which carry loss                                token_shards.py tokenised rows on disk, in shards
    block_files.py    packed blocks as Arrow files                                       tokenization.py chains the five above

Promises
- Every row that is read is either kept or in the ledger with its reason; this is checked on each run, not hoped for.
- The result does not depend on the order of rows or files, the number of workers, or the machine.
- Nothing is padded with copies, and a shortfall is reported.
- Loss is on every assistant turn and on the token that ends it, also when the tokenizer's pad token is its end token.

Never: imports torch (only `gguf.py`, the child of `semantic.py` and the tokenizer loader of `encoding.py` do, each in a process of its own); names a
download host; silently drops a multi-turn row.

Pitfalls
- Globs follow `fnmatch`, as on the hub: `*` crosses `/`.  `**/` also matches nothing, so `**/*.parquet` finds files at the top.
- A conversation that is equal to another of the same data set has the same id: the ledger tells them apart by file and row.
- Places are split by largest remainders: within a stratum a larger mixture holds the smaller one, but when `total` grows a stratum may
  lose one place to another.
- Held-out rows are taken out before quotas are drawn, so `mix.held_out` changes which rows are left, never by more than 1 % of a domain.
- The ledger names files and rows, so it changes when rows are moved between files; rows.parquet and everything after it do not.
- A compressed text or CSV file is read by one worker, whole: many files, Parquet or plain JSON lines spread over workers.
- Decontamination runs after near-duplicate removal on purpose: a near-duplicate of a contaminated row must not survive it.
"""
