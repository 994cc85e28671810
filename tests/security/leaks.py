"""A stage that says every secret that it knows, in every way in which a stage can say something."""

from __future__ import annotations

import logging
import os
import sys

from pesc.errors import DataError
from pesc.launch.child import run_child
from pesc.stage import BuildResult, StageContext

logger = logging.getLogger("pesc.leaks")
VARIABLES = (
    "HF_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI",
    "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING",
)  # fmt: skip
PRINTS = "import os, sys; print(*(os.environ[name] for name in sys.argv[1:]), 'and', 'hf_' + 'NotInTheEnvironment12345', file=sys.stderr)"


def known() -> list[str]:
    """Every secret as it is in the environment."""
    return [os.environ[name] for name in VARIABLES if name in os.environ]


def build(ctx: StageContext) -> BuildResult:
    """Log, print, report, and return them; then end as the file `end` beside the store says: well, or with one of three errors."""
    said = " ".join(known())
    for secret in known():
        logger.info("logged %s", secret)
        print("printed", secret, flush=True)
    logger.warning(
        "GET https://ada:pl4nted-in-a-url@example.org/x?X-Amz-Signature=pl4nted-signature failed: %s",
        {"Authorization": f"Bearer {known()[0]}"},
    )
    ctx.progress(1, 2, message=f"progress {said}")
    child: list[str] = []
    run_child([sys.executable, "-c", PRINTS, *(name for name in VARIABLES if name in os.environ)], {}, child.append)
    (ctx.out / "data.json").write_text('"nothing of it"')
    end = os.environ.get("PESC_TEST_END", "well")
    if end == "sentence":
        raise DataError(f"The child failed: {child[-1]} {said}")
    if end == "defect":
        raise RuntimeError(f"a defect with {said}")
    if end == "killed":
        os.kill(os.getpid(), 9)
    facts = {"url": f"https://ada:{known()[0]}@example.org", "headers": [{"x-api-key": said}], said: 1, "child": child[-1]}
    return BuildResult(metrics=dict(facts), provenance=dict(facts))
