"""The commands of the remote and of the store's layout: `pesc push`, `pesc pull`, `pesc migrate`.

pesc push                                     everything of this store, to PESC_REMOTE
pesc push demo 'camelidae-8x7b:train[pesc]' --remote s3://team/pesc --dry-run
pesc pull demo                                what the remote has of the recipe
pesc pull 3f2a91bc77aa                        by the start of a fingerprint or an object's digest
pesc migrate                                  bring an older store to today's layout
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pesc.settings import remote_url, store_root
from pesc.store import Store

if TYPE_CHECKING:
    from pesc.mirror import MirrorReport

What = Annotated[
    list[str] | None,
    typer.Argument(
        help="A recipe, RECIPE:ADDRESS, or the start of a fingerprint or digest; KEY=VALUE changes a setting of the recipes. Default: everything.",
        metavar="[RECIPE|ACTION|KEY=VALUE]...",
    ),
]
RemoteOption = Annotated[
    str | None, typer.Option("--remote", help="s3://bucket/path, gs://bucket/path or a directory. Default: $PESC_REMOTE.", metavar="URL")
]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Directory of the store. Default: $PESC_STORE or ./store.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say how many files and bytes would move.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("push")(push)
    app.command("pull")(pull)
    app.command("migrate")(migrate)


def push(what: What = None, remote: RemoteOption = None, store: StoreOption = None, dry_run: DryRun = False) -> None:
    """Give the remote what it lacks of this store: files first, manifests last.  May be killed and run again."""
    from pesc.console import progress_bar
    from pesc.mirror import chosen
    from pesc.mirror import push as send

    place = open_store(store, remote)
    words, overrides = split(what)
    with progress_bar("push") as progress:
        report = send(
            place, chosen(place, words, overrides), dry_run, lambda done, total, text: progress(done // 10**6, total // 10**6, "MB", text)
        )
    _print(report, "Would send" if dry_run else "Sent")


def pull(what: What = None, remote: RemoteOption = None, store: StoreOption = None, dry_run: DryRun = False) -> None:
    """Bring what the remote has into this store, each file checked.  May be killed and run again."""
    from pesc.console import progress_bar
    from pesc.mirror import chosen
    from pesc.mirror import pull as fetch

    place = open_store(store, remote)
    words, overrides = split(what)
    with progress_bar("pull") as progress:
        wanted = chosen(place, words, overrides, from_remote=True)
        report = fetch(place, wanted, dry_run, lambda done, total, text: progress(done // 10**6, total // 10**6, "MB", text))
    _print(report, "Would pull" if dry_run else "Pulled")


def migrate(store: StoreOption = None) -> None:
    """Bring an older store to today's layout.  May be killed and run again."""
    from pesc.store.layout import STORE_FORMAT
    from pesc.store.layout import migrate as bring

    place = Store(store or store_root(), remote=None)
    for line in bring(place.root):
        print(line)
    print(f"{place.root} has format {STORE_FORMAT}.")


def open_store(store: Path | None, remote: str | None) -> Store:
    """The store with the remote of an option, else with that of the environment."""
    return Store(store or store_root(), remote=remote or remote_url())


def split(what: list[str] | None) -> tuple[list[str], list[str]]:
    """Words and overrides."""
    return [word for word in what or () if "=" not in word], [word for word in what or () if "=" in word]


def _print(report: MirrorReport, verb: str) -> None:
    for address in report.actions:
        print(f"{verb.lower()} {address}")
    for sentence in report.differing:
        print(f"differs: {sentence}")
    print(report.summary(verb))
