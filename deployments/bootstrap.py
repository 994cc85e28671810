"""Make a Prefect server ready for this project: pools, queues, limits, deployments, schedules, automations.

    python -m deployments.bootstrap              make what is missing, mend what differs, leave the rest
    python -m deployments.bootstrap --check      only say what differs; exit code 1 if anything does
    python -m deployments.bootstrap --type docker
    python -m deployments.bootstrap --fleet my-fleet.yaml

Environment: PREFECT_API_URL; PREFECT_API_AUTH_STRING where the server asks for it; PESC_HOME and PESC_STORE, the checkout and the store on
the workers; PESC_FLEET in place of --fleet; PESC_WEBHOOK_URL, where failures are told.

What somebody switched on or off stays so: paused pools and queues, active schedules, enabled automations.  Things of other names are
not touched.  Everything else of what this makes is as the files say: a change in the UI is undone by the next run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deployments.automations import automation_things
from deployments.declared import declared_things
from deployments.fleet import BootstrapError, Fleet, PoolType, load_fleet
from deployments.pools import fleet_things
from deployments.server import Finding, Server, Thing, connected, find, mend
from pesc.errors import PescError

_PASSES = 3
"""Queues push one another's priorities: what one change moves is put right in the next pass."""
_SHOWN_DIFFERENCES = 4


def wanted_things(fleet: Fleet) -> list[Thing]:
    """Everything, in the order in which it can be made.  Raises BootstrapError."""
    return [*fleet_things(fleet), *declared_things(fleet), *automation_things(fleet)]


def check(server: Server, things: list[Thing]) -> bool:
    """Print what is missing or differs; whether nothing is."""
    findings = list(find(server, things))
    for finding in findings:
        print(f"missing  {finding.thing}" if finding.differences is None else f"differs  {finding.thing}: {_sentence(finding)}")
    if findings:
        print(f"{len(findings)} of {len(things)} differ. Run it without --check to make them as the files say.")
    else:
        print(f"Nothing differs: {len(things)} things are as the files say.")
    return not findings


def apply(server: Server, things: list[Thing]) -> None:
    """Make and mend until nothing differs, and say what was done.  Raises BootstrapError for what does not become as it should be."""
    touched: dict[str, Thing] = {}
    for _ in range(_PASSES):
        mended = 0
        for finding in find(server, things):  # one after another: making a pool makes its queue `default`
            mend(server, finding)
            print(f"made     {finding.thing}" if finding.differences is None else f"changed  {finding.thing}: {_sentence(finding)}")
            touched[str(finding.thing)] = finding.thing
            mended += 1
        if not mended:
            break
    else:
        for finding in find(server, things):
            raise BootstrapError(f"{finding.thing} does not stay as it was made: {_sentence(finding)}. Does somebody else change it?")
    if touched:
        print(f"{len(touched)} things made or changed, {len(things) - len(touched)} were as the files say.")
    else:
        print(f"Nothing to change: {len(things)} things are as the files say.")


def _sentence(finding: Finding) -> str:
    faults = [str(difference) for difference in finding.differences or ()]
    more = f"; and {len(faults) - _SHOWN_DIFFERENCES} more" if len(faults) > _SHOWN_DIFFERENCES else ""
    return "; ".join(faults[:_SHOWN_DIFFERENCES]) + more


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usage = argparse.ArgumentParser(
        prog="python -m deployments.bootstrap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usage.add_argument("--check", action="store_true", help="change nothing; say what differs, and end with 1 if anything does")
    usage.add_argument("--type", choices=PoolType.__args__, help="type of every work pool; the fleet file can give each its own")
    usage.add_argument("--fleet", type=Path, metavar="FILE", help="your own settings over deployments/fleet.yaml")
    return usage


def main(arguments: list[str] | None = None) -> int:
    """Entry point; a failure is a sentence on stderr and exit code 2."""
    given = parser().parse_args(arguments)
    fleet_file = given.fleet or (Path(os.environ["PESC_FLEET"]) if os.environ.get("PESC_FLEET") else None)
    try:
        things = wanted_things(load_fleet(fleet_file, given.type))
        with connected() as server:
            if given.check:
                return 0 if check(server, things) else 1
            apply(server, things)
    except PescError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
