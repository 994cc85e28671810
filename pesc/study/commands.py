"""`pesc study`: run a recipe to its report, and write the report with what it took.

pesc study study/smollm2-6-layers --out study            what the store has is not built again
pesc study study/smollm2-6-layers --out study --store S

Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pesc.build import Outcome
from pesc.errors import EvaluationError, HolesError, RecipeError
from pesc.plan import Selection
from pesc.recipe import Recipe, load_recipe
from pesc.settings import store_root
from pesc.store import Store
from pesc.study.costs import arm_costs, processors, whole_seconds
from pesc.study.page import study_markdown

PAGE = "study.md"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("study")(study)


def study(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.", metavar="RECIPE")],
    out: Annotated[Path, typer.Option("--out", help="Directory for study.md, report.html, results.json and plots.", file_okay=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, e.g. train.max_steps=8.", metavar="[KEY=VALUE]...")
    ] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the library's log.")] = False,
) -> None:
    """Run a study to its report, and write it with what each arm and seed took."""
    from pesc.console import ConsoleRun

    loaded, place = load_recipe(recipe, overrides or ()), Store(store or store_root())
    if loaded.report.preregistration is None:
        raise RecipeError(
            f"{loaded.name} asks no question: a study wants report.preregistration (which arms, and what counts as better), written before "
            "it is run. `pesc run` runs a recipe without one."
        )
    _check_out(out)
    try:
        with ConsoleRun(verbose=verbose) as console:
            outcomes = console.run(loaded, place, Selection())
    except HolesError as error:
        if "report" in error.finished:
            print(write_study(loaded, place, error.finished, out))
        raise
    print(write_study(loaded, place, outcomes, out))


def _check_out(out: Path) -> None:
    """What cannot be written is told before hours of work.  Raises EvaluationError, as for a directory that has other things than a study."""
    with _written(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        if any(out.iterdir()) and not (out / PAGE).is_file():
            raise EvaluationError(
                f"{out} has files that are of no study, which would be mixed with this one's: give another directory with --out."
            )


def write_study(recipe: Recipe, store: Store, outcomes: Mapping[str, Outcome], out: Path) -> Path:
    """study.md in `out`, beside the report's own files, in place of an earlier study's.  outcomes: of a run, by address, the report's among them.

    Raises EvaluationError for an `out` that cannot be written; what was there before stays until all is written beside it. Of an earlier study's
    pictures none stays.
    """
    folder = store.open(outcomes["report"].ref)
    found = {address: store.find(outcome.ref.stage, outcome.ref.fingerprint) for address, outcome in outcomes.items()}
    manifests = {address: manifest for address, manifest in found.items() if manifest}
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    built = manifests.values()
    text = study_markdown(results, recipe.description, arm_costs(recipe.arms, manifests), whole_seconds(built), processors(built))
    with _written(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".study-", dir=out) as made:
            new = Path(made) / "new"
            shutil.copytree(folder, new, copy_function=shutil.copyfile)
            (new / PAGE).write_text(text, encoding="utf-8")
            for path in sorted(new.iterdir()):
                if path.is_dir() and (out / path.name).is_dir():
                    (out / path.name).rename(Path(made) / path.name)  # an earlier study's, pictures that are no longer made among them
                path.rename(out / path.name)
    return out / PAGE


@contextmanager
def _written(out: Path) -> Iterator[None]:
    """Whatever the file system refuses is a sentence about --out."""
    try:
        yield
    except (OSError, shutil.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise EvaluationError(
            f"The study cannot be written to {out} ({reason}): give another directory with --out. What has been built is in the store."
        ) from error
