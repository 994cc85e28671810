"""A model that reads each weight when it needs it computes what the same model computes whole, and holds nothing."""

import pytest
import torch

from pesc.models.streamed import STREAMED, streamed_model
from tests.models.builders import make_sparse, tokens

ARCHITECTURES = ["llama", "qwen2", "gemma2", "phi3", "qwen3_5_text", "youtu", "gemma3n_text", "minicpm3"]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_it_computes_what_the_whole_model_computes(model_type):
    whole = make_sparse(model_type)
    weights = whole.state_dict()
    ids = tokens(2, 12)
    with torch.inference_mode():
        model = streamed_model(whole.config.to_dict(), weights.__getitem__)
        found = model(input_ids=ids, use_cache=False).logits
        expected = whole(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, expected)


def test_nothing_large_stays_in_memory():
    whole = make_sparse("llama", tie_word_embeddings=True)
    weights, asked = whole.state_dict(), []

    def read(name):
        asked.append(name)
        held = [n for n, m in model.named_modules() if isinstance(m, STREAMED) and any(p.device.type == "cpu" for p in m.parameters())]
        assert len(held) <= 1, held
        return weights[name]

    del weights["lm_head.weight"]  # tied: it is not on disk
    model = torch.nn.Module()
    model = streamed_model(whole.config.to_dict(), read)
    asked.clear()
    for _ in range(2):
        model(input_ids=tokens(1, 4), use_cache=False)
    assert asked.count("model.layers.1.mlp.adapters.up") == 2
    assert asked.count("model.embed_tokens.weight") == 4  # the head's as well
    assert all(p.device.type == "meta" for m in model.modules() if isinstance(m, STREAMED) for p in m.parameters(recurse=False))


def test_a_weight_is_let_go_of_when_the_pass_fails():
    model = streamed_model(make_sparse().config.to_dict(), make_sparse().state_dict().__getitem__)
    with pytest.raises(RuntimeError):
        model.lm_head(torch.ones(1, 3))
    assert model.lm_head.weight.device.type == "meta"
