"""One pass over rows: the reference code's own routing, rows alone, tokens that count, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pesc.models
from pesc.errors import DataError, ModelError
from pesc.models.config import UpcycleConfig
from pesc.models.mixtral import upcycle_whole
from pesc.models.published import import_published
from pesc.models.upcycle import upcycle_directory
from pesc.routing.config import RoutingConfig
from pesc.routing.counts import count_pairs, observe
from pesc.routing.loading import load_model
from pesc.routing.measures import measure
from pesc.routing.rows import Row, has_held_out, read_blocks
from tests.models.builders import make_sparse, save_dense, tokens
from tests.routing.builders import save_held_out

pesc.models.register()


def make_rows(ids_RS, domains=("code", "math"), counts=None):
    return [
        Row(np.asarray(ids), np.ones(len(ids), bool) if counts is None else np.asarray(counts[row]), domains[row % len(domains)])
        for row, ids in enumerate(ids_RS.tolist())
    ]


def test_counts_are_those_of_the_reference_codes_routers(shared_data, tmp_path):
    """A plain loop over the logits that the Camelidae code computed, against one pass over the imported checkpoint."""
    golden = shared_data / "golden/camelidae-tiny"
    import_published(golden, _new(tmp_path / "model"))
    expected = load_file(golden / "expected.safetensors")
    rows = make_rows(expected["input_ids"])
    seen = observe(load_model(tmp_path / "model", "golden", "float32", "cpu"), rows, "golden")
    names = sorted((key for key in expected if key.startswith("router_logits.")), key=lambda key: int(key.split(".")[1]))
    assert [layer.layer for layer in seen.layers] == list(range(len(names)))
    for layer, name in zip(seen.layers, names, strict=True):
        logits = expected[name].reshape(-1, 8).tolist()
        assert len(logits) == seen.num_tokens == expected["input_ids"].numel()
        load, pairs, entropy = [0] * 8, [[0] * 8 for _ in range(8)], 0.0
        for number, values in enumerate(logits):
            order = sorted(range(8), key=lambda e: -values[e])[:2]
            assert layer.index_TK[number].tolist() == order
            for e in order:
                load[e] += 1
            pairs[order[0]][order[1]] += 1
            pairs[order[1]][order[0]] += 1
            shares = torch.tensor(values, dtype=torch.float64).softmax(0)
            entropy -= (shares * shares.log()).sum().item()
        assert seen.choices_KRE(layer).sum(axis=(0, 1)).tolist() == load
        assert count_pairs(layer).tolist() == pairs
        assert layer.weight_E.sum() == pytest.approx(len(logits))
        assert layer.entropy == pytest.approx(entropy, rel=1e-4)


def test_a_model_whose_routers_read_the_domain_is_seen_as_one():
    """Attention silenced, embeddings that name the domain, routers that read it: log 3 nats in every layer, through the real pass."""
    model = make_sparse(trained=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.router.weight.zero_()
            layer.mlp.router.weight[[0, 1, 2, 3], [0, 1, 2, 3]] = 1.0  # with 3 domains: expert d, and always expert 3
        embedding = model.model.embed_tokens.weight
        embedding.zero_()
        for token in range(258):
            embedding[token, token % 3] = 1.0
            embedding[token, 3] = 0.5
    names = ("code", "general", "math")
    rows = [Row(3 * np.arange(9) + row % 3, np.ones(9, bool), names[row % 3]) for row in range(36)]
    result = measure(observe(model, rows, "planted"), RoutingConfig(permutations=999))
    for entry in result.layers:
        assert entry.choices["general"] == ((0, 108, 0, 0), (0, 0, 0, 108))
        # half of the choices are the common expert's and tell nothing
        assert entry.specialisation.mutual_information == pytest.approx(np.log(3) / 2, abs=1e-5)
        assert entry.specialisation.p == 1 / 1000


def test_a_dead_expert_is_found():
    model = make_sparse()
    with torch.no_grad():
        router = model.model.layers[1].mlp.router
        router.register_forward_hook(lambda _m, _i, logits: logits.index_fill(-1, torch.tensor([2]), -1e4))
    result = measure(observe(model, make_rows(tokens(12, 20)), "x"), RoutingConfig())
    assert result.layers[1].dead == (2,)
    assert result.layers[1].load[2] == 0
    assert 2 not in result.layers[0].dead


def test_rows_of_a_block_are_routed_as_rows_alone_and_only_what_counts_is_counted(tmp_path):
    model, ids = make_sparse(), tokens(4, 15)
    labels = [[-100] * 10 + row[10:] for row in ids.tolist()]
    folder = save_held_out(
        tmp_path, [("code", list(zip(ids.tolist()[:3], labels, strict=False))), ("math", [(ids[3].tolist(), labels[3])])]
    )
    every, answers = read_blocks(folder), read_blocks(folder, "answers")
    assert [row.domain for row in every] == ["code"] * 3 + ["math"]
    assert [row.ids_S.tolist() for row in every] == ids.tolist()
    seen, later = observe(model, every, "x"), observe(model, answers, "x")
    assert (seen.num_tokens, later.num_tokens) == (60, 20)
    with torch.no_grad():
        for row, one in enumerate(ids):
            alone = observe(model, make_rows(one[None]), "x")
            for layer, found, part in zip(alone.layers, seen.layers, later.layers, strict=True):
                assert (found.index_TK[15 * row : 15 * row + 15] == layer.index_TK).all()
                assert (part.index_TK[5 * row : 5 * row + 5] == layer.index_TK[10:]).all()


def test_the_first_blocks_of_each_domain_are_read(tmp_path):
    blocks = [("math", [[1, 2], [3]]), ("code", [[4, 5]]), ("math", [[6, 7, 8]])]
    rows = read_blocks(save_held_out(tmp_path, blocks), blocks_per_domain=1)
    assert [(row.domain, row.ids_S.tolist()) for row in rows] == [("code", [4, 5]), ("math", [1, 2]), ("math", [3])]


def test_layers_of_other_numbers_of_experts_and_dense_ones_between(tmp_path):
    save_dense(tmp_path / "dense", num_hidden_layers=3)
    upcycle_directory(
        tmp_path / "dense", _new(tmp_path / "sparse"), UpcycleConfig(num_experts=4, top_k=2, adapter_dim=8, layer_experts=(4, 0, 6))
    )
    seen = observe(load_model(tmp_path / "sparse", "x", "float32", "cpu"), make_rows(tokens(6, 10)), "x")
    assert [(layer.layer, layer.num_experts) for layer in seen.layers] == [(0, 4), (2, 6)]
    result = measure(seen, RoutingConfig(permutations=99))
    assert [len(entry.load) for entry in result.layers] == [4, 6]
    assert result.shown_layer == 0


def test_whole_ffn_experts_are_routed_too(tmp_path):
    """A Mixtral's gates, against transformers' own router logits."""
    save_dense(tmp_path / "dense")
    upcycle_whole(tmp_path / "dense", _new(tmp_path / "sparse"), UpcycleConfig(kind="whole", num_experts=4, top_k=2))
    model, ids = load_model(tmp_path / "sparse", "x", "float32", "cpu"), tokens(1, 20)
    seen = observe(model, make_rows(ids), "x")
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    assert len(seen.layers) == len(logits) == 2
    for layer, expected in zip(seen.layers, logits, strict=True):
        assert (layer.index_TK == expected.topk(2).indices.numpy()).all()


def test_what_cannot_be_routed_is_a_sentence(tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(save_dense(tmp_path / "dense"), dtype=torch.float32)
    rows = make_rows(tokens(2, 5))
    with pytest.raises(ModelError, match=r"^a model is dense: it has no router.*Give a sparse model"):
        observe(dense, rows, "a model")
    model = make_sparse()
    with pytest.raises(ModelError, match="have the token 300, but x knows 259 tokens"):
        observe(model, [Row(np.array([300]), np.array([True]), "code")], "x")
    with pytest.raises(ModelError, match="None of the 1 rows has a token that counts"):
        observe(model, [Row(np.array([3]), np.array([False]), "code")], "x")
    with torch.no_grad():
        model.model.layers[0].mlp.router.weight[1, 2] = float("nan")
    with pytest.raises(ModelError, match=r"logits of model.layers.0.mlp.router of x are not finite on row 1: load it in float32"):
        observe(model, rows, "x")


def test_blocks_that_are_not_there_are_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"no directory .* --texts"):
        read_blocks(tmp_path / "none")
    assert not has_held_out(tmp_path)
    with pytest.raises(DataError, match="has no held-out blocks"):
        read_blocks(tmp_path)


def test_a_model_that_lacks_tensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_dense(tmp_path / "dense", dtype=torch.float32)
    tensors = load_file(tmp_path / "dense/model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "dense/model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"x lacks 1 tensors \(model.layers.0.mlp.up_proj.weight\)"):
        load_model(tmp_path / "dense", "x", "float32", "cpu")
    (tmp_path / "dense/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="The model of x cannot be loaded"):
        load_model(tmp_path / "dense", "x", "float32", "cpu")


def _new(folder):
    folder.mkdir()
    return folder
