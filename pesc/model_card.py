"""The model card of a model in the store: README.md, made from manifests alone.

    pesc export 'demo:merge[pesc]' --format remote-code --out DIR      writes it beside the weights

What it tells: what the model is made of, how it was trained and on what, the report's table, whose licences hold, and what it cannot do.
Nothing is guessed: what has not been built yet is named as missing.

It stands above data, training and evaluation, which do not know each other; equal manifests give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pesc.cost import time_text
from pesc.errors import DataError
from pesc.evaluate.tables import results_table
from pesc.markdown import markdown_table
from pesc.models.published import is_published
from pesc.plan import PlannedAction, make_plan
from pesc.recipe import Recipe
from pesc.store import Store

CARD_NAME = "README.md"
_SPDX = {
    "apache-2.0": "apache-2.0", "mit": "mit", "bsd-3-clause": "bsd-3-clause", "llama 2 community license": "llama2",
    "llama 3 community license": "llama3", "llama 3.1 community license": "llama3.1", "gemma": "gemma",
}  # fmt: skip
"""Licences by the hub's names for them; any other is `other`."""
_MEASURED: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss of the last step, nats per token", lambda value: f"{value:.4g}"),
    "tokens": ("tokens", lambda value: f"{value:,.0f}"),
    "tokens_per_second": ("tokens a second", lambda value: f"{value:,.4g}"),
    "world_size": ("ranks", str),
    "zero_stage": ("ZeRO stage", str),
    "peak_memory_bytes": ("peak memory of the first rank", lambda value: f"{value / 1e9:.1f} GB"),
    "seconds_training": ("time", time_text),
}
"""Metrics of the training stage -> what people call them, and how they are written."""
_METHODS = {
    "pesc": "PESC: QLoRA on attention and the shared FFN, with adapters as experts and their routers trained in full",
    "qlora": "QLoRA on the dense model",
    "lora": "LoRA on the unquantised dense model",
    "upcycle-full": "sparse upcycling: every expert is a copy of the FFN, and everything is trained",
    "dense": "none: the dense model as it is",
}
_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory{trust})
```"""


def write_model_card(recipe: Recipe, address: str, store: Store, model_dir: Path) -> Path:
    """Write README.md of the model that `address` made into `model_dir`, over a card that came with the base; returns its path."""
    path = model_dir / CARD_NAME
    path.unlink(missing_ok=True)  # it may be a hard link to the base's
    path.write_text(render_model_card(recipe, address, store, model_dir), encoding="utf-8")
    return path


def render_model_card(recipe: Recipe, address: str, store: Store, model_dir: Path) -> str:
    """The card as markdown, with the hub's block of metadata at its head."""
    actions = {action.address: action for action in make_plan(recipe, store)}
    fields = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    arm = actions[address].node.instance
    sections = {
        "": _head(recipe, arm),
        "Use": _use(fields),
        "Architecture": _architecture(_built_directory(store, actions[address]) or model_dir),
        "Training": _training(recipe, arm, actions, store, trained=address.startswith("merge")),
        "Data": _data(recipe, store),
        "Results": _results(recipe, arm, actions, store),
        "Licences": _licences(recipe, actions),
        "Limits": _limits(recipe, arm, actions, trained=address.startswith("merge")),
        "How it was made": _provenance(address, actions),
    }
    parts = [_metadata(recipe, fields), f"# {recipe.name}, arm {arm}" if arm else f"# {recipe.name}"]
    for title, lines in sections.items():
        parts += [*([f"## {title}"] if title else []), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _metadata(recipe: Recipe, fields: Mapping[str, Any]) -> str:
    """The block that the hub reads.  A base or a data set that is no hub repository is not named there."""
    import yaml

    base = recipe.sources[recipe.base]
    hub_name = _SPDX.get(base.license.lower())
    block: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    block |= {"license": hub_name} if hub_name else {"license": "other", "license_name": base.license or "not stated"}
    if repository := _hub_name(base.uri):
        block["base_model"] = repository
    datasets = sorted({name for name in map(_hub_name, (recipe.sources[source].uri for source in _data_sources(recipe))) if name})
    block |= {"datasets": datasets} if datasets else {}
    block["tags"] = ["pesc", *(["mixture-of-experts"] if {"pesc", "num_experts", "num_local_experts"} & fields.keys() else [])]
    return f"---\n{yaml.safe_dump(block, sort_keys=False, allow_unicode=True)}---"


def _hub_name(uri: str) -> str | None:
    """`org/name` of a hub source."""
    return uri.removeprefix("hub:").removeprefix("datasets/").partition("@")[0] if uri.startswith("hub:") else None


def _public(uri: str) -> str:
    """A source as others can find it: paths of this machine mean nothing to them."""
    return f"`{uri}`" if uri.startswith(("hub:", "pypi:")) or "://" in uri else "local files"


def _data_sources(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(dataset.source for dataset in recipe.dedup.datasets.values()))


def _head(recipe: Recipe, arm: str) -> list[str]:
    base = recipe.sources[recipe.base]
    lines = [recipe.description] if recipe.description else []
    method = _METHODS[recipe.arms[arm].method] if arm in recipe.arms else _METHODS["dense"]
    return [*lines, *([""] if lines else []), f"Made of {_public(base.uri)}. Method: {method}."]


def _use(fields: Mapping[str, Any]) -> list[str]:
    if is_published(fields):
        return ["This is a published layout of PESC checkpoints, for the code of its authors, or for `pesc import DIRECTORY --out NEW`."]
    code = "auto_map" in fields
    lines = [_LOADING.format(trust=", trust_remote_code=True" if code else "")]
    if fields.get("quantization_config"):
        lines += ["", "Its projections are stored in 4 bit (NF4) and load so; `bitsandbytes` and `accelerate` must be installed."]
    if code:
        return [*lines, "", "`modeling_pesc.py` is the model's code; read it before you trust it."]
    if str(fields.get("model_type", "")).startswith("pesc_"):
        return ["Install the package `pesc` and call `pesc.models.register()` first.", "", *lines, "", "Or: `pesc chat DIRECTORY`."]
    return lines


def _built_directory(store: Store, action: PlannedAction) -> Path | None:
    """The model in this package's layout, whatever it is exported to."""
    return store.open(action.manifest.ref) if action.manifest else None


def _architecture(model_dir: Path) -> list[str]:
    from pesc.models.upcycle import count_directory, read_config

    fields = read_config(model_dir)
    rows = [("model type", str(fields.get("model_type"))), ("layers", str(fields.get("num_hidden_layers")))]
    rows += [("hidden size", str(fields.get("hidden_size"))), ("context", f"{fields.get('max_position_embeddings', 'not stated')} tokens")]
    if block := fields.get("pesc"):
        rows += [
            ("experts in a layer", str(block.get("layer_experts") or block["num_experts"])),
            ("experts of a token", str(block["top_k"])),
        ]
        rows += [("width of an adapter", str(block["adapter_dim"])), ("factor on the adapters' sum", f"{block.get('scaling', 1.0):g}")]
        counts = count_directory(model_dir)
        rows += [(name.replace("_", " "), f"{counts[name]:,}") for name in ("total_parameters", "active_parameters", "added_parameters")]
    return [markdown_table(("", ""), rows)]


def _training(recipe: Recipe, arm: str, actions: Mapping[str, PlannedAction], store: Store, trained: bool) -> list[str]:
    if not trained:
        return ["Not trained: the model computes what its base computes."]
    config = recipe.train_of(arm)
    length = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} epoch{'' if config.epochs == 1 else 's'}"
    rows = [
        ("base weights", {"nf4": "4 bit (NF4, double quantisation)", "none": "not quantised"}[config.quantization]),
        ("LoRA", f"rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {', '.join(config.lora.targets)}"),
        ("learning rate", f"{config.learning_rate:g}, {config.schedule.replace('_', ' ')}"),
        ("optimizer", config.optimizer),
        ("length", f"{length}, {config.global_batch_size} blocks of {recipe.tokenize.context_length} tokens a step"),
        ("chat template", recipe.tokenize.chat_template),
        ("seed", str(config.seed)),
    ]
    if config.method == "upcycle-full":
        del rows[1]
    train, merge = actions.get(f"train[{arm}]"), actions.get(f"merge[{arm}]")
    rows += [*_measured(train), *_merge_proof(merge, store)]
    return [markdown_table(("", ""), rows)]


def _measured(train: PlannedAction | None) -> list[tuple[str, str]]:
    """What the training stage measured, for people."""
    metrics = train.manifest.metrics if train and train.manifest else {}
    return [(label, show(metrics[name])) for name, (label, show) in _MEASURED.items() if metrics.get(name) is not None]


def _merge_proof(merge: PlannedAction | None, store: Store) -> list[tuple[str, str]]:
    """How far the merged logits are from the trained model's, beside what rounding the weights alone makes of them."""
    path = store.open(merge.manifest.ref) / "proof.json" if merge and merge.manifest else None
    if path is None or not path.is_file():
        return []
    logits = json.loads(path.read_text(encoding="utf-8"))["logits"]
    alone = f"; rounding its weights alone makes {logits['relative_rms_of_rounding']:.2%}" if logits.get("relative_rms_of_rounding") else ""
    return [("merged against unmerged", f"logits off by {logits['relative_rms_difference']:.2%} (root mean square){alone}")]


def _data(recipe: Recipe, store: Store) -> list[str]:
    """Sources and mixture as the data card tells them."""
    from pesc.data.card import built_data
    from pesc.data.card.mixing import mixture_section
    from pesc.data.card.parts import page_markdown
    from pesc.data.card.sections import headline, read_stats, sources_section

    try:
        inputs = built_data(recipe, store)
        mix = inputs.objects.get("mix")
        sources = tuple(replace(source, uri=_public(source.uri).strip("`")) for source in inputs.sources)
        sections = [sources_section(sources), *([mixture_section(read_stats(mix))] if mix else [])]
        _, _, facts = headline(inputs)
    except DataError:
        return [f"Its data stages are not in this store, so nothing can be told of the mixture: `pesc run {recipe.name} --until tokenize`."]
    lines = page_markdown("", "", facts, sections).splitlines()[2:]
    return [f"#{line}" if line.startswith("#") else line for line in "\n".join(lines).strip().splitlines()]


def _results(recipe: Recipe, arm: str, actions: Mapping[str, PlannedAction], store: Store) -> list[str]:
    report = actions.get("report")
    if report is None or report.manifest is None:
        missing = [
            a.address
            for a in actions.values()
            if a.node.stage.name == "evaluate" and a.manifest is None and a.node.instance.startswith(f"{arm}/")
        ]
        told = f" (not measured: {', '.join(missing)})" if missing else ""
        return [f"Not reported yet{told}: `pesc run {recipe.name}`."]
    results = json.loads((store.open(report.manifest.ref) / "results.json").read_text(encoding="utf-8"))
    return [f"This model is the arm `{arm}`.", "", results_table(results)]


def _licences(recipe: Recipe, actions: Mapping[str, PlannedAction]) -> list[str]:
    """Of the base and of every data set, as the recipe states them."""
    uses = [(recipe.base, "base model"), *((name, "training data") for name in _data_sources(recipe))]
    rows = []
    for name, use in uses:
        source, action = recipe.sources[name], actions.get(f"download[{name}]")
        revision = str(action.manifest.provenance.get("revision") or "–")[:12] if action and action.manifest else "not fetched here"
        rows.append((name, use, source.license or "not stated in the recipe", _public(source.uri), revision))
    note = "The licences are what the recipe states. Read the sources' own before you publish or sell what is made of them."
    return [markdown_table(("source", "used as", "licence", "from", "revision"), rows), "", note]


def _limits(recipe: Recipe, arm: str, actions: Mapping[str, PlannedAction], trained: bool) -> list[str]:
    limits = ["It knows what its base and its training data know, errors and prejudices among them, and it invents."]
    limits.append("It was not trained to refuse, and nothing measured here says that it is safe.")
    if trained:
        limits.append(f"It was trained on rows of at most {recipe.tokenize.context_length} tokens; longer conversations are outside of it.")
    if arm in recipe.arms and recipe.arms[arm].method == "pesc":
        limits.append("GGUF has no form for its adapters and routers: a converted file would be another model.")
    subsets = [name for name, benchmark in recipe.evaluate.benchmarks.items() if benchmark.limit]
    if subsets:
        limits.append(f"Measured on a part of their questions: {', '.join(subsets)}.")
    stale = [a.address for a in actions.values() if a.address == "dedup" and a.manifest is None]
    if stale or not recipe.dedup.benchmarks:
        limits.append("Its training data was not checked against the benchmarks.")
    return [f"- {limit}" for limit in limits]


def _provenance(address: str, actions: Mapping[str, PlannedAction]) -> list[str]:
    """The actions behind the model, by which anybody with the recipe finds or makes the same bytes."""
    behind, waiting = [], [address]
    while waiting:
        name = waiting.pop(0)
        if name not in behind:
            behind.append(name)
            waiting += actions[name].node.inputs.values()
    rows = []
    for name in sorted(behind, key=list(actions).index):
        manifest = actions[name].manifest
        if manifest:
            commit = str((manifest.environment.get("git") or {}).get("commit") or "")[:12]
            rows.append((name, manifest.fingerprint[:12], manifest.output.digest[:12], commit or "–"))
    return [markdown_table(("action", "fingerprint", "object", "commit of the code"), rows)]
