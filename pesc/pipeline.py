"""The stage table: the one place that says which stages there are, what they read, and which code makes their bytes.

The CLI, the plan, the runner, the Prefect tasks and flows, the deployments and the store all read this table.

    stage      instances                     reads
    download   one a source                  nothing (local files enter by content)
    dedup      one                           every source with data sets or benchmark questions
    mix        one                           dedup
    tokenize   one                           mix, the dense model's tokenizer
    upcycle    one a sparse arm              the dense model
    train      one a trained arm             the arm's model, tokenize
    merge      one a trained arm             the arm's model, train, tokenize (prompts of the proof)
    evaluate   one a benchmark of each arm   merge (or the dense model), the benchmark's source
    routing    one a sparse arm              merge, tokenize (the held-out rows)
    heldout    one an arm, where enabled     merge (or the dense model), tokenize (the held-out rows)
    report     one                           evaluate of all, train, merge, routing and heldout of each arm, dedup, mix, tokenize

Pitfall: `code_version` is part of every fingerprint. Raise it when a change of the stage's sources may change its bytes;
`stages.lock` and its test make sure that somebody decides.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pesc.data.config import DedupConfig, MixConfig, SourceConfig, TokenizeConfig
from pesc.errors import RecipeError
from pesc.evaluate.config import BenchmarkConfig, FilledReportConfig
from pesc.heldout.config import HeldOutConfig
from pesc.models.config import MergeConfig, UpcycleConfig
from pesc.routing.config import RoutingConfig
from pesc.stage import StageConfig
from pesc.train.config import TrainConfig

if TYPE_CHECKING:
    from pesc.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One row of the table."""

    name: str
    config_type: type[StageConfig]
    code_version: int
    builder: str
    """`module:function` of the builder; imported only when the stage runs."""
    sources: tuple[str, ...]
    """Modules (or packages) whose code decides the stage's bytes; their digest is in stages.lock."""
    wants_gpu: bool = False
    isolated: bool = False
    """Runs in a process of its own, so that the caller never imports torch or touches CUDA."""
    summary: str = ""
    preflight: str = ""
    """Function `recipe -> faults` that is asked before a training on which this stage waits: what would stop it then is told now."""
    keeps: tuple[str, ...] = ()
    """Files and folders of its workspace, beside the log, that go beside the manifest."""


STAGES: tuple[Stage, ...] = (
    Stage(
        "download",
        SourceConfig,
        1,
        "pesc.data.download:build",
        ("pesc.data.download", "pesc.data.sources", "pesc.data.hub", "pesc.data.url", "pesc.data.gguf", "pesc.data.layers"),
        summary="fetch and pin sources",
    ),
    Stage(
        "dedup",
        DedupConfig,
        2,
        "pesc.data.dedup:build",
        (
            "pesc.data.dedup",
            "pesc.data.prepare",
            "pesc.data.row_table",
            "pesc.data.ledger",
            "pesc.data.rows",
            "pesc.data.streams",
            "pesc.data.json_rows",
            "pesc.data.table_rows",
            "pesc.data.shards",
            "pesc.data.functions",
            "pesc.data.conversation",
            "pesc.data.formats",
            "pesc.data.turns",
            "pesc.data.text",
            "pesc.data.filters",
            "pesc.data.exact_dedup",
            "pesc.data.minhash",
            "pesc.data.decontaminate",
            "pesc.data.benchmark_index",
            "pesc.data.benchmark_items",
            "pesc.data.near_match",
            "pesc.data.ngram_table",
            "pesc.data.vocabulary",
            "pesc.data.contamination_table",
        ),
        summary="one schema, filters, exact and near duplicates, decontamination",
    ),
    Stage(
        "mix",
        MixConfig,
        2,
        "pesc.data.mixture:build",
        ("pesc.data.mixture", "pesc.data.allocation", "pesc.data.reorder"),
        summary="draw the mixture by quota",
    ),
    Stage(
        "tokenize",
        TokenizeConfig,
        3,
        "pesc.data.tokenization:build",
        (
            "pesc.data.tokenization",
            "pesc.data.chat",
            "pesc.data.encoding",
            "pesc.data.token_shards",
            "pesc.data.packing",
            "pesc.data.block_files",
        ),
        isolated=True,
        summary="chat template, assistant-only loss, packing",
    ),
    Stage(
        "upcycle",
        UpcycleConfig,
        1,
        "pesc.models.upcycle:build",
        (
            "pesc.models.upcycle",
            "pesc.models.mixtral",
            "pesc.models.nf4_files",
            "pesc.models.published",
            "pesc.models.pickle_files",
            "pesc.models.tensor_files",
            "pesc.models.factory",
            "pesc.moe",
        ),
        isolated=True,
        summary="dense to sparse",
    ),
    Stage(
        "train",
        TrainConfig,
        4,
        "pesc.train.stage:build",
        ("pesc.train", "pesc.models.factory", "pesc.models.identity", "pesc.models.mixtral", "pesc.models.nf4", "pesc.moe"),
        wants_gpu=True,
        summary="distributed QLoRA",
        keeps=("events.jsonl", "tensorboard"),
    ),
    Stage(
        "merge",
        MergeConfig,
        2,
        "pesc.models.merge:build",
        (
            "pesc.models.merge",
            "pesc.models.merge_nf4",
            "pesc.models.merge_tensor",
            "pesc.models.merge_whole",
            "pesc.models.merge_write",
            "pesc.models.identity",
            "pesc.models.new_directory",
            "pesc.models.mixtral",
            "pesc.models.lora",
            "pesc.models.pickle_files",
            "pesc.models.nf4",
            "pesc.models.nf4_files",
            "pesc.models.nf4_proof",
            "pesc.models.proof",
            "pesc.models.streamed",
            "pesc.models.trained_reference",
            "pesc.models.upcycle",
            "pesc.models.tensor_files",
            "pesc.models.factory",
            "pesc.moe",
        ),
        wants_gpu=True,
        isolated=True,
        summary="fold the LoRA, prove it",
    ),
    Stage(
        "evaluate",
        BenchmarkConfig,
        2,
        "pesc.evaluate.harness:build",
        (
            "pesc.evaluate.chunked",
            "pesc.evaluate.completions",
            "pesc.evaluate.harness",
            "pesc.evaluate.journal",
            "pesc.evaluate.language_model",
            "pesc.evaluate.rank",
            "pesc.evaluate.results",
            "pesc.evaluate.sandbox",
            "pesc.evaluate.served_model",
            "pesc.evaluate.task_index",
            "pesc.evaluate.tasks",
            "pesc.moe",
        ),
        wants_gpu=True,
        isolated=True,
        summary="one benchmark of one arm with lm-eval",
        preflight="pesc.evaluate.preflight:check",
    ),
    Stage(
        "routing",
        RoutingConfig,
        1,
        "pesc.routing.stage:build",
        (
            "pesc.routing.stage",
            "pesc.routing.rows",
            "pesc.routing.loading",
            "pesc.routing.counts",
            "pesc.routing.measures",
            "pesc.routing.results",
            "pesc.evaluate.intervals",
            "pesc.train.blocks",
            "pesc.models.factory",
            "pesc.models.mixtral",
            "pesc.moe",
        ),
        wants_gpu=True,
        isolated=True,
        summary="how the experts are used",
    ),
    Stage(
        "heldout",
        HeldOutConfig,
        1,
        "pesc.heldout.stage:build",
        (
            "pesc.heldout",
            "pesc.routing.rows",
            "pesc.routing.loading",
            "pesc.train.blocks",
            "pesc.models.factory",
            "pesc.models.mixtral",
            "pesc.moe",
        ),
        wants_gpu=True,
        isolated=True,
        summary="the loss on each held-out row",
    ),
    Stage(
        "report",
        FilledReportConfig,
        8,
        "pesc.evaluate.report:build",
        (
            "pesc.evaluate.report",
            "pesc.evaluate.baselines",
            "pesc.evaluate.comparability",
            "pesc.evaluate.comparison",
            "pesc.evaluate.intervals",
            "pesc.evaluate.origins",
            "pesc.evaluate.paired",
            "pesc.evaluate.plots",
            "pesc.evaluate.power",
            "pesc.evaluate.records",
            "pesc.evaluate.question_plots",
            "pesc.evaluate.question_tables",
            "pesc.evaluate.questions",
            "pesc.evaluate.replicates",
            "pesc.evaluate.tables",
            "pesc.evaluate.templates",
            "pesc.evaluate.verdict",
            "pesc.heldout.results",
            "pesc.routing.plots",
            "pesc.routing.results",
            "pesc.routing.tables",
            "pesc.figures",
            "pesc.markdown",
            "pesc.templates",
        ),
        summary="tables, plots, page",
    ),
)
STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)
_BY_NAME = {stage.name: stage for stage in STAGES}


def stage_named(name: str) -> Stage:
    """The row of one stage.  Raises RecipeError for an unknown name."""
    if name not in _BY_NAME:
        close = difflib.get_close_matches(name, STAGE_NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"There is no stage {name!r}.{hint} Stages: {', '.join(STAGE_NAMES)}.")
    return _BY_NAME[name]


@dataclass(frozen=True)
class Node:
    """One action of a recipe: a stage with its complete settings and where its inputs come from."""

    stage: Stage
    instance: str
    """"" for a stage that runs once, else the source, the arm, or arm/benchmark."""
    config: StageConfig
    inputs: Mapping[str, str]
    """Input name -> address of the upstream node."""
    optional: frozenset[str] = frozenset()
    """Inputs that may be left out when their action failed; the node is built as long as one benchmark of them is there."""

    @property
    def address(self) -> str:
        """`stage` or `stage[instance]`."""
        return f"{self.stage.name}[{self.instance}]" if self.instance else self.stage.name


@dataclass(frozen=True)
class Graph:
    """All nodes of a recipe in an order in which each comes after its inputs."""

    nodes: tuple[Node, ...]

    @cached_property
    def by_address(self) -> dict[str, Node]:
        """Nodes by address."""
        return {node.address: node for node in self.nodes}

    @cached_property
    def may_fail(self) -> frozenset[str]:
        """Addresses whose failure leaves a hole in what reads them instead of ending the run."""
        return frozenset(node.inputs[name] for node in self.nodes for name in node.optional)

    def select(self, patterns: Iterable[str]) -> set[str]:
        """Addresses that match: a stage name (all its instances), an address, or an arm's prefix `evaluate[pesc]`.

        Raises RecipeError for a pattern that matches nothing.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            match = re.fullmatch(r"([\w-]+)(?:\[([^\]]+)\])?", pattern.strip())
            if not match:
                raise RecipeError(f"{pattern!r} is not an address: write STAGE, STAGE[ARM] or evaluate[ARM/BENCHMARK].")
            name, instance = match.groups()
            stage_named(name)
            found = {
                n.address
                for n in self.nodes
                if n.stage.name == name and (instance is None or n.instance == instance or n.instance.startswith(f"{instance}/"))
            }
            if not found:
                there = ", ".join(n.address for n in self.nodes if n.stage.name == name) or "none in this recipe"
                raise RecipeError(f"This recipe has no {pattern!r}. Its {name} actions: {there}.")
            chosen |= found
        return chosen

    def downstream(self, addresses: Iterable[str]) -> set[str]:
        """The given addresses and everything that depends on them."""
        reached = set(addresses)
        for node in self.nodes:
            if reached.intersection(node.inputs.values()):
                reached.add(node.address)
        return reached

    def upstream(self, addresses: Iterable[str]) -> set[str]:
        """The given addresses and everything they depend on."""
        reached = set(addresses)
        for node in reversed(self.nodes):
            if node.address in reached:
                reached.update(node.inputs.values())
        return reached


def build_graph(recipe: Recipe) -> Graph:
    """Every action of a recipe."""
    nodes = [*_data_nodes(recipe)]
    for arm in recipe.arms:
        nodes.extend(_arm_nodes(recipe, arm))
    nodes.append(_report_node(recipe, nodes))
    return Graph(tuple(nodes))


def _node(stage: str, instance: str, config: StageConfig, inputs: Mapping[str, str], optional: Iterable[str] = ()) -> Node:
    return Node(_BY_NAME[stage], instance, config, dict(inputs), frozenset(optional))


def _used_sources(recipe: Recipe) -> list[str]:
    used = {recipe.base, *(d.source for d in recipe.dedup.datasets.values()), *(b.source for b in recipe.dedup.benchmarks.values())}
    used |= {b.source for b in recipe.evaluate.benchmarks.values() if b.source}
    used |= {recipe.dedup.semantic.source} if recipe.dedup.semantic else set()
    return [name for name in recipe.sources if name in used]


def _data_nodes(recipe: Recipe) -> Iterable[Node]:
    for name in _used_sources(recipe):
        yield _node("download", name, recipe.sources[name], {})
    dedup = recipe.dedup
    read = [*dedup.datasets.values(), *dedup.benchmarks.values(), *([dedup.semantic] if dedup.semantic else [])]
    rows = {item.source for item in read}
    yield _node("dedup", "", recipe.dedup, {name: f"download[{name}]" for name in sorted(rows)})
    yield _node("mix", "", recipe.mix, {"rows": "dedup"})
    yield _node("tokenize", "", recipe.tokenize, {"mixture": "mix", "model": f"download[{recipe.base}]"})


def _arm_nodes(recipe: Recipe, arm: str) -> Iterable[Node]:
    method = recipe.arms[arm].method
    model = final = f"download[{recipe.base}]"
    if method in ("pesc", "upcycle-full"):
        yield _node("upcycle", arm, recipe.upcycle_of(arm), {"model": model})
        model = f"upcycle[{arm}]"
    if method != "dense":
        yield _node("train", arm, recipe.train_of(arm), {"model": model, "blocks": "tokenize"})
        yield _node("merge", arm, recipe.merge_of(arm), {"model": model, "adapter": f"train[{arm}]", "blocks": "tokenize"})
        final = f"merge[{arm}]"
    for name, benchmark in recipe.evaluate.benchmarks.items():
        data = {"data": f"download[{benchmark.source}]"} if benchmark.source else {}
        yield _node("evaluate", f"{arm}/{name}", benchmark, {"model": final, **data})
    if method in ("pesc", "upcycle-full") and recipe.routing.enabled:
        yield _node("routing", arm, recipe.routing, {"model": final, "blocks": "tokenize"})
    if recipe.heldout.enabled:
        yield _node("heldout", arm, recipe.heldout, {"model": final, "blocks": "tokenize"})


def _report_node(recipe: Recipe, nodes: Iterable[Node]) -> Node:
    wanted = {"dedup", "mix", "tokenize", "train", "merge", "evaluate", "routing", "heldout"}
    inputs = {n.address: n.address for n in nodes if n.stage.name in wanted}
    benchmarks = tuple(n.address for n in nodes if n.stage.name == "evaluate")
    config = FilledReportConfig(**recipe.report.model_dump(), expected=benchmarks)
    others = (n.address for n in nodes if n.stage.name in ("routing", "heldout"))
    return _node("report", "", config, inputs, optional=(*benchmarks, *others))
