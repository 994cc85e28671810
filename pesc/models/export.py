"""A sparse model directory that loads without this package, with `trust_remote_code=True`.

    pesc export MODEL_DIR --format remote-code --out OUT_DIR

Weights, tokenizer and settings are hard links; `modeling_pesc.py` is one file made of the sources of `pesc.moe` and of the sparse classes of
the one architecture; config.json names it in `auto_map`.  vLLM's Transformers backend serves such a directory as it is.

Contract: the exported code is the code that trained, not a second implementation: it is cut out of the modules below by their syntax
trees.  The file imports torch and transformers, nothing else.

One thing differs: there the experts are added around the call of the MLP, not inside its `forward`.  vLLM reads the source of an MLP's
`forward` to merge its gate and up projections into one matrix and to use its own activation; it finds the dense class's own.  A hook on the MLP
therefore sees the dense FFN's output.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from pesc.errors import ModelError
from pesc.models.nf4_files import weight_specs
from pesc.models.tensor_files import TensorDirectory, link_companions, link_file
from pesc.models.upcycle import check_complete, read_config, write_config

if TYPE_CHECKING:
    from pesc.models.factory import Architecture

CODE_NAME = "modeling_pesc.py"
_MODULES = ("config", "initial", "router", "paths", "segments", "tuning", "dispatch", "adapters", "layer")
"""Modules of pesc.moe in the order in which they build on one another."""

_CLASSES = Template('''

class $config($dense_config):
    """$dense_config with the nested block `pesc`."""

    model_type = "$model_type"
    base_model_tp_plan = sparse_tp_plan($dense_config.base_model_tp_plan)
    pesc: Optional[dict] = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pesc is not None:
            self.pesc = PescConfig.from_dict(self.pesc).to_dict()


class _SparseModelMixin:
    def _init_weights(self, module):
        if isinstance(module, (Router, AdapterBank)):
            module.reset_parameters(keep=lambda parameter: getattr(parameter, "_is_hf_initialized", False))
        else:
            super()._init_weights(module)


def _call_with_experts(self, x_TH):
    """The dense MLP as a module call, then the experts.  `forward` stays the dense class's own."""
    return self.add_experts(x_TH, super(SparseMLP, self).__call__(x_TH))


del SparseMLP.forward
SparseMLP.__call__ = _call_with_experts


def _widen_layers(layers, config):
    for index, layer in enumerate(layers):
        widen_mlp(layer.mlp, PescConfig.from_dict(config.pesc), config.hidden_size, index)


class $model(_SparseModelMixin, $dense_model):
    """$dense_model whose MLPs are shared by adapters that a router chooses."""

    config_class = $config

    def __init__(self, config):
        super().__init__(config)
        _widen_layers(self.layers, config)
        self.post_init()


class $causal_lm(_SparseModelMixin, $dense_causal_lm):
    """$dense_causal_lm whose MLPs are shared by adapters that a router chooses."""

    config_class = $config

    def __init__(self, config):
        super().__init__(config)
        self.model.__class__ = $model
        _widen_layers(self.model.layers, config)
        self.post_init()
''')


def export_remote_code(model_dir: Path, out_dir: Path, link: Callable[[Path, Path], None] = link_file) -> None:
    """Write the stand-alone form of the sparse model in `model_dir` to the empty `out_dir`; `link(source, target)` puts files there.

    Raises ModelError when the model is not sparse (a dense one needs no code), or when its tensors are not those that its config.json says.
    """
    from pesc.models.factory import architecture, is_sparse
    from pesc.moe.config import PescConfig

    fields = read_config(model_dir)
    if not is_sparse(fields):
        raise ModelError(f"{model_dir} is a dense {fields.get('model_type')} model: it loads everywhere as it is, and needs no export.")
    classes = architecture(fields["model_type"])
    try:
        PescConfig.from_dict(fields.get("pesc") or {})
    except ValueError as error:
        raise ModelError(f"{model_dir / 'config.json'} cannot be used: {error}.") from None
    source = TensorDirectory(model_dir)
    check_complete(fields, weight_specs(source), model_dir)
    files = sorted({*source.files.values(), *(path.name for path in model_dir.glob("*.safetensors.index.json"))})
    for name in files:
        link(model_dir / name, out_dir / name)
    link_companions(model_dir, out_dir, link=link)
    (out_dir / CODE_NAME).unlink(missing_ok=True)
    (out_dir / CODE_NAME).write_text(render_code(classes), encoding="utf-8")
    module = CODE_NAME.removesuffix(".py")
    named = {"AutoConfig": classes.config, "AutoModel": classes.model, "AutoModelForCausalLM": classes.causal_lm}
    write_config(out_dir, fields | {"auto_map": {auto: f"{module}.{cls.__name__}" for auto, cls in named.items()}})


def render_code(classes: Architecture) -> str:
    """The source of `modeling_pesc.py` for one architecture."""
    from pesc.models.factory import sparse_tp_plan

    imports = {"from typing import Optional", "from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES"}
    bodies = [_split_source(inspect.getsource(sparse_tp_plan))[1]]
    for name in _MODULES:
        module = importlib.import_module(f"pesc.moe.{name}")
        found, body = _split_source(inspect.getsource(module))
        imports |= found
        bodies.append(body)
    dense = (classes.dense_config, classes.dense_causal_lm, classes.dense_model)
    imports |= {f"from {cls.__module__} import {cls.__name__}" for cls in dense}
    names = {
        "model_type": classes.model_type,
        "config": classes.config.__name__,
        "model": classes.model.__name__,
        "causal_lm": classes.causal_lm.__name__,
        "dense_config": dense[0].__name__,
        "dense_causal_lm": dense[1].__name__,
        "dense_model": dense[2].__name__,
    }
    head = f'"""{classes.causal_lm.__name__}: made by pesc.models.export from the sources of pesc.moe; change it there."""\n'
    # No `from __future__ import annotations`, whose strings a config's validation cannot read; quoted names are quoted one by one.
    return "\n".join([head, *sorted(imports), "", *bodies]) + _CLASSES.substitute(names)


def _split_source(source: str) -> tuple[set[str], str]:
    """The imports of a module (without those of pesc and of __future__), and the rest without the module's docstring."""
    tree = ast.parse(source)
    imports, body = set(), []
    for node in tree.body:
        if isinstance(node, ast.Import):
            imports.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            if not (node.module or "").startswith(("pesc", "__future__")):
                imports.add(ast.unparse(node))
        elif not (node is tree.body[0] and isinstance(node, ast.Expr)):
            body.append(ast.unparse(_QuoteAnnotations().visit(node)))
    return imports, "\n\n".join(body) + "\n"


class _QuoteAnnotations(ast.NodeTransformer):
    """Annotations of functions as strings: a class may name itself in them."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = self._quote(node.returns)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            argument.annotation = self._quote(argument.annotation)
        return node

    @staticmethod
    def _quote(annotation: ast.expr | None) -> ast.expr | None:
        return annotation and ast.Constant(ast.unparse(annotation))
