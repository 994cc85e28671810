"""Build one action of a store in a process of its own.

    python -m pesc.launch.one_job STORE JOB.json RESULT.json       (what the child runs; `pesc.launch.side_by_side` starts it)

Progress and log records come back as events on stdout, the outcome or the error as RESULT.json.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pesc.build import Job, build_or_open
from pesc.errors import PescError
from pesc.launch.events import ProgressEmitter
from pesc.launch.isolated import configure_logging, error_record, write_json
from pesc.store import Store


def main(store: Path, job: Path, result: Path) -> int:
    """Build or open the job of a file.  Any error but a PescError leaves its traceback on stderr."""
    configure_logging(logging.INFO)
    try:
        outcome = build_or_open(Store(store), Job.model_validate_json(job.read_bytes()), ProgressEmitter())
    except PescError as error:
        write_json(result, {"error": error_record(error)})
        return 3
    write_json(result, {"ref": outcome.ref.model_dump(mode="json"), "how": outcome.how, "seconds": outcome.seconds})
    return 0


if __name__ == "__main__":
    sys.exit(main(*(Path(argument) for argument in sys.argv[1:4])))
