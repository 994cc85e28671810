"""Facts of the machine: what a manifest records, and what a user is told before a run is needlessly slow."""

import pytest

from pesc import provenance


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ("flags\t\t: fpu sse2 avx2 fma", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512_bf16", False),
        ("flags\t\t: fpu avx2 avx512f avx512bw amx_bf16", False),
        ("Features\t: fp asimd bf16", False),
        ("processor\t: 0", False),
    ],
    ids=["avx2", "avx512", "amx", "arm", "a system that does not say"],
)
def test_a_cpu_without_bfloat16_matrices_is_named_with_the_setting(monkeypatch, flags, warns):
    found = dict([part.strip() for part in line.split(":", 1)] for line in (flags, "model name\t: Old CPU"))
    monkeypatch.setattr(provenance, "_cpu_field", lambda *names: next((found[name] for name in names if name in found), ""))
    sentence = provenance.slow_bfloat16_sentence("train.compute_dtype")
    assert bool(sentence) is warns
    if warns:
        assert sentence.startswith("This CPU (Old CPU) has no instructions for bfloat16 matrices")
        assert sentence.endswith("set train.compute_dtype=float32.")


def test_the_flags_are_read_from_the_system():
    assert provenance._cpu_field("flags", "Features", "model name", "processor")


def test_an_image_without_a_checkout_names_the_commit_that_it_was_built_from(monkeypatch, tmp_path):
    assert set(provenance.git_state() or {}) in ({"commit", "dirty"}, set())
    monkeypatch.setattr(provenance, "PROJECT_ROOT", tmp_path)
    assert provenance.git_state() is None
    monkeypatch.setenv("PESC_COMMIT", "3f2a91bc")
    assert provenance.git_state() == {"commit": "3f2a91bc", "dirty": False}
