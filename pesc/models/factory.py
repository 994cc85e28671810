"""The sparse twin of a transformers architecture, made from the dense classes.

    sparse = architecture("llama")          PescLlamaConfig, PescLlamaModel, PescLlamaForCausalLM
    model = sparse.causal_lm.from_pretrained(dense_directory, config=sparse_config(dense_config, PescConfig()))

Nothing of the dense model is re-implemented: its constructor builds it, then each decoder layer's MLP is widened in place (`pesc.moe.layer`).
So quantisation, PEFT, gradient checkpointing, KV cache, generation, DeepSpeed and attention kernels work as they do on the dense model.

The dense classes come from transformers' own auto mappings.  Any causal LM fits whose base model is `model` with `model.layers`, each with an
`mlp` that takes one tensor and returns one of its shape, and without experts of its own; what does not fit is refused with the reason.

Contract
- An architecture is known to the Auto classes once it is made; `register_architectures` makes the main ones, and the others when a file asks.
- model_type is `pesc_<dense model_type>`; the sparse settings are the nested block `pesc` of config.json (`pesc.moe.config.PescConfig`).
- Dense parameter names are unchanged; each layer gains `mlp.router.weight`, `mlp.adapters.down` and `mlp.adapters.up`.
- Tensor parallelism: the dense model's plan, with router and bank whole on every rank (`sparse_tp_plan`).
- A parameter that a checkpoint lacks is drawn from (pesc.seed, its name): a dense checkpoint loads as exactly the dense model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.models.auto import modeling_auto, tokenization_auto

from pesc.errors import ModelError
from pesc.moe.adapters import AdapterBank
from pesc.moe.config import PescConfig
from pesc.moe.layer import SparseMLP, widen_mlp
from pesc.moe.router import Router

if TYPE_CHECKING:
    _ConfigBase, _ModelBase = PretrainedConfig, PreTrainedModel
else:
    _ConfigBase = _ModelBase = object  # the mixins stand before a dense class of their own

PREFIX = "pesc_"

MAIN_TYPES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
"""Dense model types that are registered at once; any other that fits is found when it is asked for."""

_PROBE_FIELDS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
"""Fields of a config whose defaults alone make no model."""


@dataclass(frozen=True)
class Architecture:
    """One architecture, dense and sparse."""

    dense_type: str
    dense_config: type[PretrainedConfig]
    dense_model: type[PreTrainedModel]
    dense_causal_lm: type[PreTrainedModel]
    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]

    @property
    def model_type(self) -> str:
        """The sparse model_type, `pesc_<dense>`."""
        return PREFIX + self.dense_type


def architecture(model_type: str) -> Architecture:
    """The classes for a dense model_type (or its sparse twin).  Raises ModelError for an architecture that is not supported."""
    return _make_architecture(model_type.removeprefix(PREFIX))


def architecture_of(fields: dict[str, Any]) -> Architecture:
    """The classes for the fields of a config.json, by the type that AutoConfig reads there: a mistral with layer_types is a ministral."""
    model_type = str(fields.get("model_type", ""))
    return architecture("ministral" if model_type == "mistral" and "layer_types" in fields else model_type)


@cache
def _make_architecture(dense_type: str) -> Architecture:
    """The classes, made once: two classes of one name would not be each other's instances."""
    dense_config, dense_model, dense_causal_lm = _find_dense_classes(dense_type)
    if dense_type not in MAIN_TYPES:
        reason = _probe(dense_config, dense_model, dense_causal_lm)
        if reason:
            raise _refused(dense_type, reason)
    config = _make_config(dense_config)
    model = _make_model(dense_model, config)
    causal_lm = _make_causal_lm(dense_causal_lm, config, model)
    classes = Architecture(dense_type, dense_config, dense_model, dense_causal_lm, config, model, causal_lm)
    _register(classes)
    return classes


def _refused(dense_type: str, reason: str) -> ModelError:
    return ModelError(
        f"There is no sparse form of model_type {dense_type!r}, because {reason}: "
        f"choose a dense decoder whose layers own an `mlp` ({', '.join(MAIN_TYPES)}, and others like them)."
    )


def _find_dense_classes(dense_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """Config, base model and causal LM of a model type.  Raises ModelError when this transformers has no such causal LM."""
    if dense_type not in CONFIG_MAPPING:
        raise _refused(dense_type, "this transformers does not know it")
    config = CONFIG_MAPPING[dense_type]
    model, causal_lm = MODEL_MAPPING.get(config, None), MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
    if config.model_type != dense_type or not isinstance(model, type) or not isinstance(causal_lm, type):
        raise _refused(dense_type, "transformers has no causal LM and base model of its own for it")
    return config, cast(type[PreTrainedModel], model), cast(type[PreTrainedModel], causal_lm)


def _probe(config_class: type[PretrainedConfig], model_class: type[PreTrainedModel], causal_lm_class: type[PreTrainedModel]) -> str:
    """Why the classes cannot be widened, or an empty string; reads a model of default size on the meta device."""
    try:
        config, model = _build_probe(config_class, causal_lm_class)
    except Exception as error:  # whatever a foreign constructor raises
        return f"no model can be built of its default config ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    if model is None:
        text = getattr(config, "text_config", None)
        return f"its config is made of parts ({', '.join(config.sub_configs)})" + (
            f"; its text part is a {text.model_type!r}" if text else ""
        )
    base = getattr(model, "model", None)
    if type(base) is not model_class:
        return f"{causal_lm_class.__name__} does not hold a {model_class.__name__} as `model`"
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return f"{model_class.__name__} has no list `layers`"
    return next(filter(None, map(_misfit, layers)), "") or _probe_mlp(cast(nn.Module, layers[0].mlp), getattr(config, "hidden_size", None))


def _build_probe(config_class, causal_lm_class) -> tuple[PretrainedConfig, PreTrainedModel | None]:
    """Config and model on the meta device, of defaults, or of small fields where those are not complete; no model of a composite config."""
    for fields in ({}, _PROBE_FIELDS):
        try:
            config = config_class(**fields)
            if config.sub_configs:
                return config, None
            with torch.device("meta"):
                return config, causal_lm_class(config)
        except Exception:
            if fields:
                raise
    raise AssertionError("unreachable")


def _misfit(layer: nn.Module) -> str:
    """Why one decoder layer cannot be widened, or an empty string."""
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        return f"a {type(layer).__name__} has no `mlp` (it has {', '.join(name for name, _ in layer.named_children())})"
    if isinstance(mlp, SparseMLP):
        return ""
    own = [name for name, _ in layer.named_modules() if "expert" in name]
    own += [f"mlp.{name}" for name, _ in (*mlp.named_modules(), *mlp.named_parameters()) if "router" in name or "adapters" in name]
    if own:
        return f"a {type(layer).__name__} has experts or adapters of its own (`{own[0]}`)"
    parameters = inspect.signature(mlp.forward).parameters
    if len(parameters) != 1:
        return f"{type(mlp).__name__} takes {', '.join(parameters)} instead of the hidden states alone"
    return ""


def _probe_mlp(mlp: nn.Module, hidden_size: int | None) -> str:
    """Why an `mlp` on the meta device is no map from [..., H] to one tensor [..., H], or an empty string."""
    if hidden_size is None:
        return "its config has no `hidden_size`"
    x_TH = torch.empty(1, 2, hidden_size, device="meta", dtype=next(mlp.parameters()).dtype)
    try:
        with torch.no_grad():
            y_TH = mlp(x_TH)
    except Exception as error:  # whatever a foreign forward raises
        return f"{type(mlp).__name__} does not run on hidden states ({type(error).__name__}: {error})"
    if not isinstance(y_TH, torch.Tensor) or y_TH.shape != x_TH.shape:
        return f"{type(mlp).__name__} does not return one tensor of its input's shape"
    return ""


def sparse_config(dense: PretrainedConfig, pesc: PescConfig) -> PretrainedConfig:
    """The sparse config of a dense one: everything the same, plus the `pesc` block."""
    classes = architecture(dense.model_type)
    fields = dense.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "pesc"):
        fields.pop(name, None)
    fields |= {"architectures": [classes.causal_lm.__name__], "pesc": pesc.to_dict()}
    return classes.config(**fields)


def is_sparse(config: PretrainedConfig | dict[str, Any]) -> bool:
    """Whether a config (or the dict of a config.json) is of a sparse model."""
    model_type = config.get("model_type", "") if isinstance(config, dict) else config.model_type
    return str(model_type).startswith(PREFIX)


def causal_lm_of(fields: dict[str, Any]) -> PreTrainedModel:
    """A model of a config.json's fields, dense or sparse, with start values; inside `torch.device("meta")` it allocates nothing."""
    classes = architecture_of(fields)
    config, causal_lm = (classes.config, classes.causal_lm) if is_sparse(fields) else (classes.dense_config, classes.dense_causal_lm)
    return causal_lm(config.from_dict(fields))


def register_architectures() -> None:
    """Tell the Auto classes of every sparse architecture that this transformers can build.  Idempotent.

    The main ones are made at once.  For any other causal LM stands a config class that makes the architecture when a file asks for it.
    """
    for dense_type in MAIN_TYPES:
        if dense_type in CONFIG_MAPPING:
            architecture(dense_type)
    for dense_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if PREFIX + dense_type not in CONFIG_MAPPING:
            AutoConfig.register(PREFIX + dense_type, _make_stand_in(dense_type))


def _register(classes: Architecture) -> None:
    AutoConfig.register(classes.model_type, classes.config, exist_ok=True)
    AutoModel.register(classes.config, classes.model, exist_ok=True)
    AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
    _register_tokenizer(classes)


def _make_stand_in(dense_type: str) -> type[PretrainedConfig]:
    """What AutoConfig holds of an architecture that nobody has asked for: made or read, it gives the real config.

    Making it imports no model.  Pitfall: it is not a class to subclass or to compare with; `architecture` returns the real one.
    """

    def __new__(cls, *args, **kwargs):
        return architecture(dense_type).config(*args, **kwargs)

    def from_dict(cls, config_dict, **kwargs):
        return architecture(dense_type).config.from_dict(config_dict, **kwargs)

    namespace = {"__module__": __name__, "model_type": PREFIX + dense_type, "__new__": __new__, "from_dict": classmethod(from_dict)}
    return type(f"StandIn({PREFIX}{dense_type})", (PretrainedConfig,), namespace)


def _register_tokenizer(classes: Architecture) -> None:
    """Let AutoTokenizer choose for the sparse model_type what it chooses for the dense one (it decides by the type's name)."""
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    if classes.dense_type in names:
        names[classes.model_type] = names[classes.dense_type]
    distrusted = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", None)
    if distrusted is not None and classes.dense_type in distrusted:
        distrusted.add(classes.model_type)
    tokenizer = tokenization_auto.TOKENIZER_MAPPING.get(classes.dense_config, None)
    if tokenizer is not None:
        AutoTokenizer.register(classes.config, tokenizer, exist_ok=True)


class _SparseConfigMixin(_ConfigBase):
    """The `pesc` block: kept as a plain dict (it is JSON), checked when the config is made."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pesc is not None:
            self.pesc = PescConfig.from_dict(self.pesc).to_dict()
        if self.model_type == f"{PREFIX}mistral" and getattr(self, "layer_types", None):
            raise ModelError(
                f"config.json says {self.model_type} with layer_types, which that model would not read: set model_type to {PREFIX}ministral."
            )


def read_pesc_config(config: PretrainedConfig) -> PescConfig:
    """The sparse settings of a model's config.  Raises ModelError when it has none."""
    block = getattr(config, "pesc", None)
    if not block:
        raise ModelError(f"The config of this {config.model_type} model has no `pesc` block: set num_experts, top_k and adapter_dim there.")
    return PescConfig.from_dict(block)


class _SparseModelMixin(_ModelBase):
    """What every sparse class adds to its dense class: initial values of router and bank."""

    def _init_weights(self, module):
        if isinstance(module, Router | AdapterBank):
            module.reset_parameters(keep=lambda parameter: getattr(parameter, "_is_hf_initialized", False))
        else:
            super()._init_weights(module)


def _widen_layers(layers: Iterable[Any], config: PretrainedConfig, pesc: PescConfig) -> None:
    """Widen every layer.  Raises ModelError for one that this config has made into something else than the type's usual layer."""
    if pesc.layer_experts is not None and len(pesc.layer_experts) != config.num_hidden_layers:
        raise ModelError(f"pesc.layer_experts names {len(pesc.layer_experts)} layers, but the model has {config.num_hidden_layers}.")
    for index, layer in enumerate(layers):
        reason = _misfit(layer)
        if reason:
            raise _refused(str(config.model_type).removeprefix(PREFIX), f"with this config.json {reason}")
        widen_mlp(layer.mlp, pesc, config.hidden_size, index)


def _publish(cls: type) -> type:
    """Make a class that was built here importable by its name, so that it pickles and its repr tells the truth."""
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def __getattr__(name: str) -> type:
    """A class that this process has not made yet: what a pickle from elsewhere asks for."""
    dense = name.removeprefix("Pesc")
    for dense_type, causal_lm in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if dense != name else ():
        config = CONFIG_MAPPING[dense_type].__name__ if dense_type in CONFIG_MAPPING else ""
        if dense in (config, causal_lm, modeling_auto.MODEL_MAPPING_NAMES.get(dense_type), *_own_names(config)):
            classes = architecture(dense_type)
            for cls in (classes.config, classes.model, classes.causal_lm):
                if cls.__name__ == name:
                    return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def sparse_tp_plan(dense: dict[str, Any] | None) -> dict[str, Any] | None:
    """The tensor-parallel plan of a dense config, and that router and bank are whole on every rank; None when the dense model has none.

    The FFN's output is whole on every rank after its last projection, so each rank adds the experts to it without a word to the others.
    A transformers without a name for that leaves alone what its plan does not name, which is the same.
    """
    if not dense or "replicate" not in ALL_PARALLEL_STYLES:
        return dense
    return dense | {"layers.*.mlp.router": "replicate", "layers.*.mlp.adapters": "replicate"}


def _make_config(dense: type[PretrainedConfig]) -> type[PretrainedConfig]:
    namespace = {
        "__module__": __name__,
        "__doc__": f"{dense.__name__} with the nested block `pesc`.",
        "__annotations__": {"pesc": dict | None},
        "model_type": PREFIX + dense.model_type,
        "base_model_tp_plan": sparse_tp_plan(dense.base_model_tp_plan),
        "pesc": None,
    }
    return _publish(type(f"Pesc{dense.__name__}", (_SparseConfigMixin, dense), namespace))


def _make_model(dense: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    def __init__(self, config):
        pesc = read_pesc_config(config)
        dense.__init__(self, config)
        _widen_layers(self.layers, config, pesc)
        self.post_init()

    return _make_class(dense, config_class, __init__)


def _make_causal_lm(
    dense: type[PreTrainedModel], config_class: type[PretrainedConfig], base: type[PreTrainedModel]
) -> type[PreTrainedModel]:
    def __init__(self, config):
        pesc = read_pesc_config(config)
        dense.__init__(self, config)
        # The dense constructor has built the dense base model: it becomes the sparse one in place, as its layers do.
        self.model.__class__ = base
        _widen_layers(self.model.layers, config, pesc)
        self.post_init()

    return _make_class(dense, config_class, __init__)


def _own_names(config_name: str) -> tuple[str, str]:
    """Names, after a config's, of base model and causal LM of a type that borrows those of another: two types may not share a name."""
    stem = config_name.removesuffix("Config")
    return f"{stem}Model", f"{stem}ForCausalLM"


def _make_class(dense: type[PreTrainedModel], config_class: type[PretrainedConfig], init) -> type[PreTrainedModel]:
    name, dense_config = dense.__name__, config_class.__mro__[2]
    if dense.__module__.rpartition(".")[0] != dense_config.__module__.rpartition(".")[0]:
        name = _own_names(dense_config.__name__)["ForCausalLM" in name]
    namespace = {
        "__module__": __name__,
        "__doc__": f"{dense.__name__} whose MLPs are shared by adapters that a router chooses (see pesc.moe).",
        "__annotations__": {"config": config_class},
        "__init__": init,
        "config_class": config_class,
    }
    return _publish(type(f"Pesc{name}", (_SparseModelMixin, dense), namespace))
