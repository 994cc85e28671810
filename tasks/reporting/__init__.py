"""What the Prefect UI is shown: plans, progress, results and reports, as artifacts.

Map
    artifacts.py    the one way in which an artifact is written: without secrets, and never at the cost of a run
    tables.py       Markdown tables, and values as text
    drawing.py      a graph of actions, as Mermaid draws it
    plans.py        what will run and why (plan-RECIPE); how the results came from one another (lineage-RECIPE)
    fit.py          what training will need of each GPU, before it starts (fit-RECIPE)
    progress.py     how far a stage is: a bar, log lines, and the live curves of a training (progress-…, training-…)
    results.py      one result (STAGE-ARM-RECIPE), a training, a routing, the data card
    runs.py         a whole run: what it did (run-…), cost (cost-…), benchmarks (benchmarks-…, benchmark-…), history (history-…), page (page-…)
    care.py         what `gc`, `fsck` and their like have found (store-…)

Key contracts
- Artifacts of one key keep their history: `benchmarks-demo` is a time line of benchmark tables, `benchmark-pesc-mmlu-demo` one of a single
  benchmark, with a version for every run, whether it computed the result or found it.
- An artifact is a view: one that cannot be written costs a warning and never a run.
- They are made for the column of the UI's page that an artifact gets, some 650 pixels: few columns, short names, long paths in a block.
"""

from pesc.markdown import markdown_table
from tasks.reporting.artifacts import artifact_key
from tasks.reporting.care import publish_note
from tasks.reporting.fit import publish_fit
from tasks.reporting.plans import lineage_markdown, plan_markdown, publish_lineage, publish_plan
from tasks.reporting.progress import ProgressReport
from tasks.reporting.results import publish_card, publish_result, publish_routing, publish_training, result_markdown
from tasks.reporting.runs import publish_cost, publish_history, publish_report, publish_summary
from tasks.reporting.tables import seconds_text

__all__ = [
    "ProgressReport",
    "artifact_key",
    "lineage_markdown",
    "markdown_table",
    "plan_markdown",
    "publish_card",
    "publish_cost",
    "publish_fit",
    "publish_history",
    "publish_lineage",
    "publish_note",
    "publish_plan",
    "publish_report",
    "publish_result",
    "publish_routing",
    "publish_summary",
    "publish_training",
    "result_markdown",
    "seconds_text",
]
