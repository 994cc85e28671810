"""Attention kernels, caches and generate are the dense model's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

import pesc.models
from pesc.models.factory import architecture
from tests.models.builders import make_sparse, save_dense, save_sparse, tokens

pesc.models.register()
LENGTH = 8


def continuation(model, prompt, **options):
    """Greedy tokens after the prompt."""
    model.generation_config.eos_token_id = None
    return model.generate(prompt, max_new_tokens=LENGTH, do_sample=False, **options)[:, prompt.shape[1] :]


@pytest.mark.parametrize("kernel", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow), "flash_attention_2"])
def test_every_attention_kernel_gives_what_it_gives_the_dense_model(tmp_path, kernel):
    if kernel == "flash_attention_2" and not (is_flash_attn_2_available() and torch.cuda.is_available()):
        pytest.skip("flash-attn is not installed here, or there is no GPU")
    where = dict(dtype=torch.bfloat16, device_map="cuda") if kernel == "flash_attention_2" else dict(dtype=torch.float32)
    save_dense(tmp_path / "dense")
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense, sparse = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation=kernel, **where) for name in ("dense", "sparse")
    )
    assert sparse.config._attn_implementation == kernel
    ids, mask = tokens().to(sparse.device), torch.ones(2, 12, dtype=torch.long, device=sparse.device)
    mask[0, :4] = 0
    with torch.no_grad():
        assert torch.equal(sparse(ids, attention_mask=mask).logits[:, 4:], dense(ids, attention_mask=mask).logits[:, 4:])


def test_the_kernel_can_be_changed_on_a_loaded_model():
    model = make_sparse()
    logits = {}
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        logits[kernel] = model(tokens()).logits
    assert torch.allclose(logits["eager"], logits["sdpa"], atol=1e-4)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gemma3_text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "gemma2", "cohere", "starcoder2"))],
)
def test_generation_with_any_cache_equals_generation_without(model_type):
    model, prompt = make_sparse(model_type), tokens(2, 5)
    without = continuation(model, prompt, use_cache=False)
    assert without.shape == (2, LENGTH)
    assert torch.equal(continuation(model, prompt, use_cache=True), without)
    assert torch.equal(continuation(model, prompt, cache_implementation="static"), without)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_greedy_generation_is_the_dense_models_right_after_upcycling(tmp_path, model_type):
    save_dense(tmp_path / "dense", model_type)
    save_sparse(tmp_path / "dense", tmp_path / "sparse")
    dense, sparse = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    assert torch.equal(continuation(sparse, tokens(2, 6)), continuation(dense, tokens(2, 6)))
    assert sparse.generation_config.pad_token_id == dense.generation_config.pad_token_id == 258


@pytest.mark.parametrize("model_type", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_a_padded_batch_generates_what_its_rows_generate_alone(model_type):
    """Padding tokens are routed too, but no other token sees them."""
    model = make_sparse(model_type)
    short, long = tokens(1, 5, seed=1), tokens(1, 9, seed=2)
    padded = torch.cat([torch.cat([torch.full((1, 4), 258), short], dim=1), long])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    together = continuation(model, padded, attention_mask=mask)
    assert torch.equal(together[0], continuation(model, short, attention_mask=torch.ones_like(short))[0])
    assert torch.equal(together[1], continuation(model, long, attention_mask=torch.ones_like(long))[0])


def test_beams_follow_their_own_caches():
    model, prompt = make_sparse(), tokens(1, 5)
    cached, plain = (continuation(model, prompt, num_beams=3, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def test_a_trained_bank_changes_what_is_generated():
    trained, untrained = make_sparse(trained=True), make_sparse(trained=False)
    assert type(trained) is architecture("llama").causal_lm
    assert not torch.equal(continuation(trained, tokens(2, 6)), continuation(untrained, tokens(2, 6)))
