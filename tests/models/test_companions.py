"""Generation config and chat template go the whole way: dense, upcycled, merged, exported, imported again."""

import json

import pytest

from pesc.models.config import MergeConfig
from pesc.models.export import export_remote_code
from pesc.models.export_published import export_published
from pesc.models.merge import build
from pesc.models.published import import_published
from pesc.stage import StageContext
from tests.models.builders import save_blocks, save_dense, save_sparse, save_trained

NAMES = ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def merged(tmp_path):
    dense = save_dense(tmp_path / "dense")
    path = dense / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.9, "do_sample": True}))
    (dense / "chat_template.jinja").write_text("{{ messages[0]['content'] }}: one of its own")
    sparse = save_sparse(dense, tmp_path / "sparse")
    inputs = {"model": sparse, "adapter": save_trained(sparse, tmp_path / "trained"), "blocks": save_blocks(tmp_path / "blocks")}
    (tmp_path / "merged").mkdir()
    build(StageContext("merge[pesc]", MergeConfig(), inputs, tmp_path / "merged", tmp_path))
    return tmp_path / "merged"


def test_they_are_the_dense_models_bytes_everywhere(merged, tmp_path):
    for name in ("remote-code", "camelidae", "again"):
        (tmp_path / name).mkdir()
    export_remote_code(merged, tmp_path / "remote-code")
    export_published(merged, tmp_path / "camelidae", "camelidae", lambda *_args, **_kwargs: None)
    import_published(tmp_path / "camelidae", tmp_path / "again")
    for directory in ("sparse", "merged", "remote-code", "camelidae", "again"):
        for name in NAMES:
            assert (tmp_path / directory / name).read_bytes() == (tmp_path / "dense" / name).read_bytes(), (directory, name)
