"""Benchmarks of every arm, and the report that compares them.

    harness.py         evaluate[ARM/BENCHMARK]: one lm-eval task of one model      results.py    the schema of what it writes
    task_index.py      finds the task; items from files in place of the hub         tasks/        this package's own tasks
    language_model.py  engine transformers: lm-eval's Hugging Face model           sandbox/      runs model-written code
    served_model.py    engine vllm: a server of vLLM's, asked by completions.py     chunked.py    what both share: chunks, journal, marks
    report.py          report: tables, plots and one page                           comparison.py what the numbers allow to say
    baselines/         published figures with their sources                         intervals.py  intervals and tests
    comparability.py   which published figures count, and why others do not         verdict.py    when a difference is one
    power.py           how small a difference a set of questions can show           paired.py     an arm against the control
    replicates.py      several training runs of an arm
    runs.py            pesc compare: evaluations of several runs side by side
    origins.py         which object each number comes from, and holes            history.py     each benchmark over the runs of a recipe
    training_page.py   one training run in Markdown, with its curves, for people who follow a pipeline
    records.py, tables.py, plots.py, templates/                                     parts of the page

Promises: prompts and scoring are lm-eval's; the same inputs give the same bytes; every score comes with its interval, its number of
examples and how many of the items were asked; a published figure is never called comparable when the settings differ.

Never: contacts the hub for a benchmark that names a source; runs model-written code outside the sandbox; compares arms on different
items.

Pitfalls: `limit` holds for each subtask of a group. bf16 log-likelihoods differ in the last digits between machines. Engine vllm batches
requests as they come, so that a near tie may turn from run to run. Importing this package, `config` or `report` loads neither torch nor
lm_eval; `harness.build` does.
"""
