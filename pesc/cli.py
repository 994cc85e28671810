"""The `pesc` command.

pesc recipes                              the recipes that ship with the package
pesc plan demo                            what would run, and why
pesc run demo --refresh evaluate          run it (no server needed)
pesc push demo                            to the remote of PESC_REMOTE; `pesc pull` brings it to another machine
pesc run demo train.learning_rate=1e-4    with an override, typed by the recipe's models
pesc fit camelidae-8x7b --gpu a100-80:16  whether training fits these GPUs, and what it costs
pesc compare demo demo@20260101 --out DIR runs side by side, item by item: intervals, tests, verdicts
pesc reproduce 3f2a91bc77aa               build a stored result again from its manifest, and compare every byte
pesc study study/smollm2-6-layers --out DIR   a study to its report, with what each arm and seed took
pesc cost demo                            time, GPU-hours, dollars and measured energy of what has been built
pesc card demo --out DIR                  the data card: sources, removed rows, contamination, mixture, samples
pesc upcycle MODEL --out DIR              one conversion alone; so do import and export
pesc chat 'demo:merge[pesc]'              talk with a model; `pesc generate` answers prompts and files of them
pesc publish DIR --repo ORG/NAME          put a model on the hub, and check that it arrived
pesc serve 'demo:merge[pesc]'             an OpenAI-compatible server, through vLLM
pesc routing 'demo:merge[pesc]' --out DIR  how the experts are used: load, who works together, domains
pesc launch camelidae-8x7b --hostfile F    train on the machines of a hostfile, over ssh
pesc bench convert                        measure it on this machine

A failure that the user can mend is one sentence on stderr and exit code 1; wrong usage is exit code 2.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pesc.bench.commands import bench
from pesc.errors import PescError, RecipeError, TransientRemoteError, disk_sentence
from pesc.evaluate import commands as evaluate_commands
from pesc.evaluate import suite_commands
from pesc.fit import commands as fit_commands
from pesc.generate import commands as generate_commands
from pesc.launch import commands as launch_commands
from pesc.models import commands as model_commands
from pesc.plan import Plan, Selection, make_plan
from pesc.publish import commands as publish_commands
from pesc.recipe import load_recipe, recipe_names
from pesc.redaction import redact_error
from pesc.routing import commands as routing_commands
from pesc.serve import commands as serve_commands
from pesc.settings import store_root, use_remote
from pesc.store import Store
from pesc.store import commands as store_commands
from pesc.study import commands as study_commands

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.split("\n\n")[0] if __doc__ else ""
)
dev = typer.Typer(no_args_is_help=True, help="For those who change this package.")
model_commands.add_to(app)
fit_commands.add_to(app)
launch_commands.add_to(app)
generate_commands.add_to(app)
publish_commands.add_to(app)
serve_commands.add_to(app)
evaluate_commands.add_to(app)
routing_commands.add_to(app)
suite_commands.add_to(app)
study_commands.add_to(app)
store_commands.add_to(app)
app.add_typer(bench, name="bench")
app.add_typer(dev, name="dev")

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change, e.g. train.learning_rate=1e-4.", metavar="[KEY=VALUE]...")]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")]
RemoteOption = store_commands.RemoteOption
Only = Annotated[list[str] | None, typer.Option("--only", help="Build these alone: STAGE, STAGE[ARM] or evaluate[ARM/BENCHMARK].")]
From = Annotated[list[str] | None, typer.Option("--from", help="Build these and what depends on them.")]
Until = Annotated[list[str] | None, typer.Option("--until", help="Build these and what they need.")]
Refresh = Annotated[list[str] | None, typer.Option("--refresh", help="Build these again even when the store has them.")]


def _store(path: Path | None, remote: str | None = None) -> Store:
    if remote:
        use_remote(remote)
    return Store(path or store_root())


def _answering(store: Store) -> Store:
    """The store, without its remote when that does not answer: said at once, not after every action."""
    try:
        if store.remote:
            store.remote.check(tries=1)
    except TransientRemoteError as error:
        print(f"pesc: {error} What follows is of {store.root} alone.", file=sys.stderr)
        return store.alone()
    return store


def _selection(only: list[str] | None, start: list[str] | None, until: list[str] | None, refresh: list[str] | None) -> Selection:
    return Selection(tuple(only or ()), tuple(start or ()), tuple(until or ()), tuple(refresh or ()))


@app.command()
def recipes() -> None:
    """List the recipes that ship with the package."""
    width = max(map(len, recipe_names()), default=0)
    for name in recipe_names():
        print(f"{name:<{width}}  {load_recipe(name).description}")


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="DeepSpeed's settings of each trained arm, as JSON, instead.")] = False,
) -> None:
    """Print a recipe in full: defaults filled in, overrides applied."""
    loaded = load_recipe(recipe, overrides or ())
    resolved = loaded.model_dump(mode="json")
    if deepspeed:
        from pesc.train.deepspeed import configs_by_arm

        arms = {name: loaded.train_of(name) for name, arm in loaded.arms.items() if arm.method != "dense"}
        print(json.dumps(configs_by_arm(arms, loaded.execution), indent=2))
    elif as_json:
        print(json.dumps(resolved, indent=2))
    else:
        import yaml

        print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=120), end="")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    refresh: Refresh = None,
    store: StoreOption = None,
    remote: RemoteOption = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 10 when something would run.")] = False,
) -> None:
    """Say what would run, and why.  Builds nothing."""
    place = _answering(_store(store, remote))
    made = make_plan(load_recipe(recipe, overrides or ()), place, _selection(only, start, until, refresh))
    _print_plan(made)
    if exit_code and made.counts["HIT"] < len(made.actions):
        raise typer.Exit(10)


def _print_plan(made: Plan) -> None:
    width = max(len(a.address) for a in made)
    colour = {"HIT": "\033[32m", "RUN": "\033[33m", "BLOCKED": "\033[31m"} if sys.stdout.isatty() else {}
    for action in made:
        status = f"{colour.get(action.status, '')}{action.status:<7}{chr(27) + '[0m' if colour else ''}"
        took = f"  (took {_duration(action.last_seconds)} last time)" if action.status == "RUN" and action.last_seconds else ""
        print(f"{status} {action.address:<{width}}  {action.reason}{took}")
    print(", ".join(f"{count} {status}" for status, count in made.counts.items() if count))


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    only: Only = None,
    start: From = None,
    until: Until = None,
    refresh: Refresh = None,
    store: StoreOption = None,
    remote: RemoteOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the library's log.")] = False,
) -> None:
    """Run a recipe in this process.  Needs no server; shares every result with the Prefect flows."""
    from pesc.console import ConsoleRun

    loaded, place = load_recipe(recipe, overrides or ()), _store(store, remote)
    with ConsoleRun(verbose=verbose) as console:
        console.run(loaded, place, _selection(only, start, until, refresh))


@app.command()
def explain(recipe: RecipeArgument, address: str, overrides: Overrides = None, store: StoreOption = None) -> None:
    """Tell everything about one action: why it would run or not, its key, and the manifest of its result."""
    place, loaded = _store(store), load_recipe(recipe, overrides or ())
    actions = {a.address: a for a in make_plan(loaded, place)}
    if address not in actions:
        raise RecipeError(f"Recipe {loaded.name!r} has no action {address!r}. It has: {', '.join(actions)}.")
    action = actions[address]
    print(f"{action.address}: {action.status}, {action.reason}")
    print(f"stage        {action.node.stage.name} (code_version {action.node.stage.code_version}): {action.node.stage.summary}")
    print(f"fingerprint  {action.fingerprint or 'known when its inputs are built'}")
    for name, upstream in action.node.inputs.items():
        print(f"input        {name} = {upstream} ({actions[upstream].status})")
    if action.manifest:
        here = place.object_path(action.manifest.output.digest)
        print(f"object       {here}{f' (to be pulled from {place.remote.url})' if place.remote and not here.is_dir() else ''}")
        print(action.manifest.model_dump_json(indent=2, exclude={"output": {"files"}}))
    else:
        print(json.dumps(action.node.config.model_dump(mode="json"), indent=2))


@app.command()
def reproduce(
    name: Annotated[
        str, typer.Argument(help="The start of an object's digest, as the report names it, or of a fingerprint.", metavar="OBJECT")
    ],
    store: StoreOption = None,
) -> None:
    """Build a stored result again from its manifest, and compare every byte.  The store is left as it is."""
    from pesc.console import progress_bar
    from pesc.reproduce import find_manifest, verdict
    from pesc.reproduce import reproduce as build_again

    place = _store(store)
    manifest = find_manifest(place, name)
    with progress_bar(manifest.address) as progress:
        found = build_again(place, manifest, lambda p: progress(p.done, p.total, p.unit, p.message))
    if not found.is_same:
        raise PescError(verdict(found))
    print(verdict(found))


@app.command()
def cost(recipe: RecipeArgument, overrides: Overrides = None, store: StoreOption = None) -> None:
    """What the results that the store has took: time, GPU-hours, dollars, and energy where it was measured."""
    from pesc.cost import HEAD, NOTE, cost_rows, costs_of

    costs = costs_of(make_plan(load_recipe(recipe, overrides or ()), _store(store)))
    if not costs:
        raise RecipeError(f"Nothing of recipe {recipe!r} is in the store {_store(store).root}. `pesc run {recipe}` builds it.")
    rows = [list(HEAD), *cost_rows(costs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        print(
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(NOTE)


@app.command()
def card(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option("--out", help="Directory that card.html and card.md are written to.", file_okay=False)],
    overrides: Overrides = None,
    store: StoreOption = None,
) -> None:
    """Write the data card of what has been built so far."""
    from pesc.data.card import built_data, write_card

    inputs = built_data(load_recipe(recipe, overrides or ()), _store(store))
    for path in write_card(inputs, out):
        print(path)
    for address, reason in inputs.missing.items():
        print(f"not on the card: {address} ({reason})")


@app.command()
def fsck(
    store: StoreOption = None, repair: Annotated[bool, typer.Option(help="Set damaged things aside, so that they are built again.")] = False
) -> None:
    """Check every object's bytes against its name, and every action against its object."""
    from pesc.store.maintenance import fsck as check

    place = _store(store)
    report = check(place, repair)
    for problem in report.problems:
        print(f"damaged: {problem}")
    for done in report.repaired:
        print(f"repaired: {done}")
    for path in report.leftovers:
        print(f"unfinished: {path.relative_to(place.root)} (a run resumes from it; `pesc gc` removes it when it is old)")
    print(
        f"{report.num_actions} actions, {report.num_objects} objects: {'clean' if report.is_clean else f'{len(report.problems)} problems'}"
    )
    if not report.is_clean and not repair:
        raise PescError(
            f"The store {place.root} is damaged. `pesc fsck --repair` sets the damaged parts aside; the next run builds them again."
        )


@app.command()
def gc(
    keep_recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-recipe",
            help="Keep what this recipe hits; with overrides: 'demo train.seed=3'. Default: all that ship, and each one's last run.",
        ),
    ] = None,
    keep_days: Annotated[float, typer.Option(min=0, help="Keep what was made or used in the last N days.")] = 30.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove. Without it, only say what would go.")] = False,
    store: StoreOption = None,
) -> None:
    """Find results that nothing needs.  A dry run unless --delete is given."""
    from pesc.collect import collect

    place = _store(store)
    report = collect(place, keep_recipe or None, keep_days, delete)
    for kind, path in report.by_kind:
        print(f"{'removed' if delete else 'would remove'} {kind} {path.relative_to(place.root)}")
    total = len(report.by_kind)
    verb = "Freed" if delete else "Would free"
    print(f"{verb} {report.freed_bytes / 1e6:.1f} MB in {total} places; {report.kept_actions} actions kept.")
    if total and not delete:
        print("Nothing was removed: add --delete to remove.")


@app.command()
def adopt(
    recipe: RecipeArgument,
    address: str,
    fingerprint: Annotated[str, typer.Option("--from", help="Fingerprint (or its start) of the earlier result.")],
    reason: Annotated[str, typer.Option(help="Why the earlier result still stands; kept in the manifest.")],
    overrides: Overrides = None,
    store: StoreOption = None,
) -> None:
    """Keep an expensive result after a change that cannot have altered it."""
    from pesc.build import adopt as adopt_result
    from pesc.build import make_job

    place, loaded = _store(store), load_recipe(recipe, overrides or ())
    actions = {a.address: a for a in make_plan(loaded, place)}
    if address not in actions:
        raise RecipeError(f"Recipe {loaded.name!r} has no action {address!r}. It has: {', '.join(actions)}.")
    action = actions[address]
    if action.status == "HIT":
        raise RecipeError(f"{address} of recipe {loaded.name!r} has a result already ({action.reason}); there is nothing to adopt.")
    if missing := [name for name in action.node.inputs.values() if actions[name].status != "HIT"]:
        raise RecipeError(f"{address} cannot adopt a result before its inputs are there: {', '.join(missing)}.")
    donors = [m for m in place.manifests(action.node.stage.name) if m.fingerprint.startswith(fingerprint)]
    if len({m.fingerprint for m in donors}) != 1:
        found = "several results start" if donors else "no result starts"
        raise RecipeError(f"In the store, {found} with {fingerprint!r} for {action.node.stage.name}; give more of the fingerprint.")
    refs = {a.address: a.manifest.ref for a in actions.values() if a.manifest}
    made = adopt_result(place, make_job(action.node, loaded, refs), donors[0], reason)
    print(f"{address} now stands on {donors[0].fingerprint[:12]}, object {made.output.digest[:12]}: {reason}")


@dev.command()
def lock() -> None:
    """Write stages.lock for the sources as they are."""
    from pesc.code_lock import write_lock

    print(f"stages.lock: {', '.join(write_lock()) or 'nothing changed'}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except PescError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("Interrupted. Finished stages and checkpoints are kept: run the same command again to go on.", 130)
    except BrokenPipeError:  # `pesc plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        sentence = disk_sentence(error, store_root())
        if sentence is None:
            redact_error(error)
            raise
        _fail(sentence, 1)
    except Exception as error:  # a defect of this package: its traceback is shown, without secrets
        redact_error(error)
        raise


def _fail(message: str, code: int) -> None:
    print(f"pesc: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
