"""The command that publishes a model: `pesc publish`.

pesc publish to-share --repo my-team/llama-8x7b --dry-run        what would be sent, and what stays here
pesc publish to-share --repo my-team/llama-8x7b --private        asks, sends, and looks whether all arrived
pesc publish 'demo:merge[pesc]' --repo my-team/demo --yes        exported first, as remote code with its card; nothing is left here

A directory is published as it is; a model of the store becomes what others can open.

Pitfall: a process that is killed while it publishes a model of the store leaves `.publish-*` there: hard links, which can be deleted.
Nothing here imports torch; an export of a model of the store does.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pesc.errors import CancelledError, PublishError
from pesc.settings import store_root

if TYPE_CHECKING:
    from pesc.model_argument import ModelPlace
    from pesc.publish.contents import Contents
    from pesc.publish.repository import ModelRepository, Remote


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("publish")(publish)


def publish(
    model: Annotated[
        str, typer.Argument(help="Directory of a whole model, or RECIPE:ADDRESS in the store, e.g. 'demo:merge[pesc]'.", metavar="MODEL")
    ],
    repo: Annotated[str, typer.Option("--repo", help="Where to: made when it is not there.", metavar="ORG/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private; refuses one that is public.")] = False,
    revision: Annotated[str, typer.Option("--revision", help="Branch; made when it is not there.", metavar="BRANCH")] = "main",
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.", metavar="TEXT")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be sent. Asks the hub nothing.")] = False,
    store: Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")] = None,
) -> None:
    """Publish a model on the Hugging Face hub, as one commit, and check that it arrived.

    The token is HF_TOKEN's, or that of `hf auth login`.
    """
    from pesc.model_argument import find_model
    from pesc.publish.card import check_card
    from pesc.publish.contents import select_contents
    from pesc.publish.repository import ModelRepository

    repository = ModelRepository(repo, revision, private)
    root = store or store_root()
    place = find_model(model, root)
    with _as_others_open_it(place, root) as (directory, fields):
        contents = select_contents(directory, fields)
        licence = check_card(directory)
        _print_contents(contents, fields, licence)
        if dry_run:
            print(f"A dry run: nothing was sent to {repo}.")
            return
        remote = repository.look()
        _confirm(repository, remote, contents, yes)
        _publish(repository, contents, message or _default_message(place))


@contextlib.contextmanager
def _as_others_open_it(place: ModelPlace, root: Path) -> Iterator[tuple[Path, dict]]:
    """The directory to publish and its config.json: the user's own, or an export of a model of the store, gone afterwards."""
    from pesc.model_card import write_model_card
    from pesc.models.tensor_files import TensorDirectory, link_companions, link_file
    from pesc.models.upcycle import read_config
    from pesc.store import Store

    if place.recipe is None:
        yield place.directory, place.fields
        return
    with tempfile.TemporaryDirectory(prefix=".publish-", dir=root) as name:
        building = Path(name)
        if "pesc" in place.fields:
            from pesc.models.export import export_remote_code

            export_remote_code(place.directory, building)
        else:
            weights = TensorDirectory(place.directory).files.values()
            index = [path.name for path in place.directory.glob("*.safetensors.index.json")]
            for file in sorted({*weights, *index, "config.json"}):
                link_file(place.directory / file, building / file)
            link_companions(place.directory, building)
        write_model_card(place.recipe, place.address, Store(root), building)
        yield building, read_config(building)


def _print_contents(contents: Contents, fields: dict, licence: str) -> None:
    from pesc.publish.contents import notes

    for name in contents.files:
        print(f"{contents.size(name) / 1e6:>12,.1f} MB  {name}")
    print(f"{contents.num_bytes / 1e6:>12,.1f} MB  in {len(contents.files)} files; licence: {licence}")
    for name, reason in contents.left_out.items():
        print(f"stays here: {name} ({reason})")
    for note in notes(contents, fields):
        print(f"note: {note}")


def _confirm(repository: ModelRepository, remote: Remote, contents: Contents, yes: bool) -> None:
    """Say what changes on the hub, and ask.  Raises CancelledError for a no, PublishError where nobody can be asked."""
    from pesc.publish.repository import stale_files

    what = "private" if remote.private or (not remote.commit and repository.private) else "public, unless its owner's default is another"
    state = f"is there ({'private' if remote.private else 'public'})" if remote.commit else f"will be made ({what})"
    print(f"{repository.url} {state}; branch {repository.branch}")
    for name in stale_files(remote, contents):
        print(f"will be removed there: {name} (it would be loaded in place of this model; it stays in the history)")
    if yes:
        return
    if not sys.stdin.isatty():
        raise PublishError("Nobody can be asked whether to publish, as standard input is no terminal: add --yes.")
    if not typer.confirm("Publish?"):
        raise CancelledError("Nothing was sent.")


def _publish(repository: ModelRepository, contents: Contents, message: str) -> None:
    from pesc.console import progress_bar
    from pesc.publish.repository import hash_files

    with progress_bar("reading") as progress:
        digests = hash_files(contents, progress)
    remote = repository.make()
    commit = repository.send(contents, digests, remote, message, lambda line: print(line, file=sys.stderr))
    repository.check(contents, digests, commit)
    print(repository.url)
    there = " (all was there already)" if commit == remote.commit else ""
    print(f"commit {commit}{there}: the hub lists all {len(contents.files)} files with the digests that they have here")


def _default_message(place: ModelPlace) -> str:
    """Names the recipe and address, never a path of this machine."""
    import pesc

    what = f"{place.recipe.name}:{place.address}" if place.recipe else "a model"
    return f"Publish {what} with pesc {pesc.__version__}"
