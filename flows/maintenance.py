"""Care of the store: find what nothing needs, check what is there, give the remote what it lacks.

The first two report; they change something only when asked.

prefect deployment run gc/cpu --param 'keep_recipes=["demo", "/data/ours.yaml train.seed=3"]'
prefect deployment run fsck/cpu --param repair=true
prefect deployment run push/cpu --param 'what=["demo"]'
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger

from flows.chain import open_store
from flows.hooks import HOOKS
from flows.parameters import Text
from pesc import mirror
from pesc.collect import collect
from pesc.errors import StoreError
from pesc.settings import remote_url
from pesc.store import Store, maintenance
from tasks.execution import library_records
from tasks.reporting import publish_note


@flow(name="gc", flow_run_name="gc delete={delete}", persist_result=False, **HOOKS)
def gc(
    keep_recipes: list[Text] | None = None, keep_days: float = 30.0, delete: bool = False, store: str | None = None
) -> maintenance.GcReport:
    """Find results that nothing needs. A dry run unless `delete` is given.

    Args:
        keep_recipes: Keep what these recipes hit, each a name or a path with its overrides: demo train.seed=3. Default: all that ship, and what the last run
            of each recipe used.
        keep_days: Keep what was made or used in the last N days.
        delete: Remove it. Without it, only say what would go.
        store: Directory of the store. Default: PESC_STORE of the worker, else ./store.
    """
    with library_records():
        place = open_store(store)
        report = collect(place, keep_recipes, keep_days, delete)
        lines = [str(path.relative_to(place.root)) for _, path in report.by_kind]
        verb = "Freed" if delete else "Would free"
        summary = f"{verb} {report.freed_bytes / 1e6:.1f} MB in {len(lines)} places; {report.kept_actions} actions kept"
        get_run_logger().info("%s.", summary)
        publish_note("store-gc", summary, lines)
    return report


@flow(name="fsck", flow_run_name="fsck repair={repair}", persist_result=False, **HOOKS)
def fsck(repair: bool = False, store: str | None = None) -> maintenance.FsckReport:
    """Check every object's bytes against its name, and every action against its object. A damaged store fails the run.

    Args:
        repair: Set damaged things aside, so that they are built again.
        store: Directory of the store. Default: PESC_STORE of the worker, else ./store.
    """
    place = open_store(store)
    with library_records():
        report = maintenance.fsck(place, repair)
        _publish(report)
    if not report.is_clean and not repair:
        raise StoreError(
            f"The store {place.root} is damaged in {len(report.problems)} places: {report.problems[0]} "
            "Run fsck with repair=true: it sets the damaged parts aside, and the next run builds them again."
        )
    return report


@flow(name="push", persist_result=False, **HOOKS)
def push(
    what: list[Text] | None = None, remote: Text | None = None, dry_run: bool = False, store: str | None = None
) -> mirror.MirrorReport:
    """Give the remote what it lacks of the store: files first, manifests last. Interrupted runs go on where they were.

    Args:
        what: Recipes, RECIPE:ADDRESS, or the starts of fingerprints or digests. Default: everything that the store has.
        remote: s3://bucket/path, gs://bucket/path or a directory. Default: PESC_REMOTE of the worker.
        dry_run: Only say how many files and bytes would be sent.
        store: Directory of the store. Default: PESC_STORE of the worker, else ./store.
    """
    with library_records():
        place = Store(open_store(store).root, remote=remote or remote_url())
        report = mirror.push(place, mirror.chosen(place, what or ()), dry_run)
        summary = report.summary("Would send" if dry_run else "Sent")
        get_run_logger().info("%s", summary)
        for sentence in report.differing:
            get_run_logger().warning("%s", sentence)
        publish_note("store-push", summary, [*report.differing, *report.actions])
    return report


def _publish(report: Any) -> None:
    log = get_run_logger()
    for problem in report.problems:
        log.error("damaged: %s", problem)
    state = "clean" if report.is_clean else f"{len(report.problems)} problems"
    summary = f"{report.num_actions} actions, {report.num_objects} objects: {state}"
    log.info("%s.", summary)
    unfinished = [f"unfinished: {path}" for path in report.leftovers]
    publish_note("store-fsck", summary, [*report.problems, *(f"repaired: {text}" for text in report.repaired), *unfinished])
