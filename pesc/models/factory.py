"""The sparse twin of a transformers architecture, made from the dense classes.

    sparse = architecture("llama")          PescLlamaConfig, PescLlamaModel, PescLlamaForCausalLM
    model = sparse.causal_lm.from_pretrained(dense_directory, config=sparse_config(dense_config, PescConfig()))

Nothing of the dense model is re-implemented: its constructor builds it, then each decoder layer's MLP is widened in place (`pesc.moe.layer`).
So quantisation, PEFT, gradient checkpointing, KV cache, generation, DeepSpeed and attention kernels work as they do on the dense model.

Contract
- model_type is `pesc_<dense model_type>`; the sparse settings are the nested block `pesc` of config.json (`pesc.moe.config.PescConfig`).
- Dense parameter names are unchanged; each layer gains `mlp.router.weight`, `mlp.adapters.down` and `mlp.adapters.up`.
- A parameter that a checkpoint lacks is drawn from (pesc.seed, its name): a dense checkpoint loads as exactly the dense model.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto import tokenization_auto

from pesc.errors import ModelError
from pesc.moe.adapters import AdapterBank
from pesc.moe.config import PescConfig
from pesc.moe.layer import widen_mlp
from pesc.moe.router import Router

if TYPE_CHECKING:
    _ConfigBase, _ModelBase = PretrainedConfig, PreTrainedModel
else:
    _ConfigBase = _ModelBase = object  # the mixins stand before a dense class of their own

PREFIX = "pesc_"

DENSE_CLASSES: dict[str, str] = {
    "gemma2": "gemma2:Gemma2",
    "gemma3_text": "gemma3:Gemma3:Gemma3Text",
    "granite": "granite:Granite",
    "llama": "llama:Llama",
    "mistral": "mistral:Mistral",
    "olmo2": "olmo2:Olmo2",
    "phi3": "phi3:Phi3",
    "qwen2": "qwen2:Qwen2",
    "qwen3": "qwen3:Qwen3",
}
"""Dense model_type -> `module:prefix of the causal LM[:prefix of config and base model]` in transformers.models."""


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


@cache
def _make_architecture(dense_type: str) -> Architecture:
    """The classes, made once: two classes of one name would not be each other's instances."""
    if dense_type not in DENSE_CLASSES:
        raise ModelError(
            f"There is no sparse form of model_type {dense_type!r}: it must be one of {', '.join(DENSE_CLASSES)} "
            "(a new one is a line in pesc.models.factory.DENSE_CLASSES, if its decoder layers have an `mlp`)."
        )
    module, prefix, *base_prefix = DENSE_CLASSES[dense_type].split(":")
    base = base_prefix[0] if base_prefix else prefix
    package = f"transformers.models.{module}"
    config_module = importlib.import_module(f"{package}.configuration_{module}")
    modeling = importlib.import_module(f"{package}.modeling_{module}")
    dense_config, dense_model = getattr(config_module, f"{base}Config"), getattr(modeling, f"{base}Model")
    dense_causal_lm = getattr(modeling, f"{prefix}ForCausalLM")
    config = _make_config(dense_config)
    model = _make_model(dense_model, config)
    return Architecture(
        dense_type, dense_config, dense_model, dense_causal_lm, config, model, _make_causal_lm(dense_causal_lm, config, model)
    )


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
    classes = architecture(fields.get("model_type", ""))
    config, causal_lm = (classes.config, classes.causal_lm) if is_sparse(fields) else (classes.dense_config, classes.dense_causal_lm)
    return causal_lm(config.from_dict(fields))


def register_architectures() -> None:
    """Tell the Auto classes of every sparse architecture that this transformers can build.  Idempotent."""
    for dense_type in DENSE_CLASSES:
        if importlib.util.find_spec(f"transformers.models.{DENSE_CLASSES[dense_type].split(':')[0]}") is None:
            continue
        classes = architecture(dense_type)
        AutoConfig.register(classes.model_type, classes.config, exist_ok=True)
        AutoModel.register(classes.config, classes.model, exist_ok=True)
        AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
        _register_tokenizer(classes)


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


def _widen_layers(layers, config: PretrainedConfig, pesc: PescConfig) -> None:
    for index, layer in enumerate(layers):
        widen_mlp(layer.mlp, pesc, config.hidden_size, index)


def _publish(cls: type) -> type:
    """Make a class that was built here importable by its name, so that it pickles and its repr tells the truth."""
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def _make_config(dense: type[PretrainedConfig]) -> type[PretrainedConfig]:
    namespace = {
        "__module__": __name__,
        "__doc__": f"{dense.__name__} with the nested block `pesc`.",
        "__annotations__": {"pesc": dict | None},
        "model_type": PREFIX + dense.model_type,
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


def _make_class(dense: type[PreTrainedModel], config_class: type[PretrainedConfig], init) -> type[PreTrainedModel]:
    namespace = {
        "__module__": __name__,
        "__doc__": f"{dense.__name__} whose MLPs are shared by adapters that a router chooses (see pesc.moe).",
        "__annotations__": {"config": config_class},
        "__init__": init,
        "config_class": config_class,
    }
    return _publish(type(f"Pesc{dense.__name__}", (_SparseModelMixin, dense), namespace))
