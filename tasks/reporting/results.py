"""One result: how it was made, a training's curves, the use of the experts, the data card."""

from __future__ import annotations

from typing import Any

import yaml

from pesc.build import Outcome
from pesc.markdown import markdown_table
from pesc.recipe import Recipe
from pesc.store import Manifest, Store
from tasks.reporting.artifacts import artifact_key, best_effort, finish_markdown, write_markdown
from tasks.reporting.tables import bytes_text, seconds_text, value_text


@best_effort
def publish_result(store: Store, outcome: Outcome) -> None:
    """How one result was made."""
    manifest = _manifest_of(store, outcome)
    write_markdown(
        artifact_key(outcome.address, manifest.recipe), result_markdown(store, manifest),
        f"{outcome.address} {manifest.recipe}: {seconds_text(manifest.seconds)}, object {manifest.output.digest[:8]}",
    )  # fmt: skip


def _manifest_of(store: Store, outcome: Outcome) -> Manifest:
    manifest = store.find(outcome.ref.stage, outcome.ref.fingerprint)
    if manifest is None:
        raise FileNotFoundError(f"{outcome.address} has no manifest")
    return manifest


def result_markdown(store: Store, manifest: Manifest) -> str:
    """A manifest for reading: names, inputs, measurements, where it was made; settings folded away."""
    environment = manifest.environment
    facts = [
        ["size", f"{bytes_text(manifest.output.size_bytes)} in {len(manifest.output.files)} files"],
        ["took", seconds_text(manifest.seconds)],
        *([f"input {name}", f"`{digest[:12]}`"] for name, digest in manifest.key.inputs.items()),
        *([name.replace("_", " "), value_text(name, value)] for name, value in manifest.provenance.items()),
        ["made by", _made_by(manifest)],
        *([[ "hardware", _hardware_text(environment["hardware"])]] if environment.get("hardware") else []),
    ]  # fmt: skip
    measured = [[name.replace("_", " "), value_text(name, value)] for name, value in manifest.metrics.items()]
    parts = [f"# {manifest.address} of {manifest.recipe}", markdown_table(["", ""], facts)]
    if measured:
        parts += ["## Measured", markdown_table(["", ""], measured)]
    settings = yaml.safe_dump(manifest.key.config, sort_keys=False, allow_unicode=True, width=80)
    names = f"object       {store.object_path(manifest.output.digest)}\nfingerprint  {manifest.fingerprint}"
    parts += ["## Names", f"```text\n{names}\n```", f"<details><summary>Settings</summary>\n\n```yaml\n{settings}```\n\n</details>"]
    return "\n\n".join(parts) + "\n"


def _made_by(manifest: Manifest) -> str:
    git = manifest.environment.get("git") or {}
    commit = f", commit `{str(git['commit'])[:12]}`{' with changes' if git.get('dirty') else ''}" if git.get("commit") else ""
    return f"code version {manifest.key.code_version}{commit} on {manifest.environment.get('host', 'an unknown host')}"


def _hardware_text(hardware: dict[str, Any]) -> str:
    gpus = hardware.get("gpus") or []
    words = [f"{len(gpus)} × {gpus[0]}"] if gpus else []
    words += [f"{hardware.get('cores', '?')} cores of {hardware.get('cpu') or 'an unknown CPU'}"]
    words += [bytes_text(hardware["memory_bytes"])] if hardware.get("memory_bytes") else []
    return ", ".join(words)


@best_effort
def publish_training(store: Store, outcome: Outcome) -> None:
    """The curves of a training run."""
    from pesc.evaluate.training_page import training_markdown

    manifest = _manifest_of(store, outcome)
    title = f"Training: {outcome.address} of {manifest.recipe}"
    events = store.action_path(outcome.ref.stage, outcome.ref.fingerprint) / "events.jsonl"
    text = training_markdown(title, store.open(outcome.ref), events)
    finish_markdown(artifact_key("training", outcome.address, manifest.recipe), text, title)


@best_effort
def publish_routing(store: Store, outcome: Outcome) -> None:
    """The use of the experts, in numbers and pictures."""
    from pesc.data_uri import as_data_uri
    from pesc.figures import svg_text
    from pesc.routing.plots import draw
    from pesc.routing.results import read_result
    from pesc.routing.tables import routing_markdown

    manifest = _manifest_of(store, outcome)
    result = read_result(store.open(outcome.ref))
    pictures = [f"![{name}]({as_data_uri(svg_text(figure))})" for name, figure in draw(result).items()]
    text = "\n\n".join([routing_markdown({outcome.address: result}, level=1), *pictures]) + "\n"
    write_markdown(artifact_key(outcome.address, "experts", manifest.recipe), text, f"Experts: {outcome.address} of {manifest.recipe}")


@best_effort
def publish_card(store: Store, recipe: Recipe) -> None:
    """The data card of what has been built so far."""
    from pesc.data.card import built_data, render_card

    text = render_card(built_data(recipe, store)).embedded
    write_markdown(artifact_key("data-card", recipe.name), text, f"Data of {recipe.name}")
