"""Keys of a bucket in Prefect's Secret blocks: a stage run alone finds its inputs in the remote with them, and the process forgets them."""

import json
import os
from pathlib import Path

import pytest

from flows import stages
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.redaction import redact
from pesc.run import run_recipe
from pesc.store import Store
from tasks.secrets import run_secrets
from tests.flows import observe
from tests.store.conftest import bucket, bucket_server

__all__ = ["bucket", "bucket_server"]
pytestmark = pytest.mark.usefixtures("prefect_server")
KEYS = {"AWS_ACCESS_KEY_ID": "key-of-a-block", "AWS_SECRET_ACCESS_KEY": "secret-of-a-block"}


@pytest.fixture
def keys_in_blocks(bucket, monkeypatch, tmp_path):
    """The keys are in Secret blocks, and nowhere else."""
    from prefect.blocks.system import Secret

    for name, value in KEYS.items():
        Secret(value=value).save(name.lower().replace("_", "-"), overwrite=True)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    yield lambda: [monkeypatch.delenv(name) for name in KEYS]
    for name in KEYS:
        Secret.delete(name.lower().replace("_", "-"))


@pytest.mark.slow
def test_a_stage_s_inputs_are_found_in_a_bucket_whose_keys_are_in_blocks(recipe_file, fakes, bucket, tmp_path, monkeypatch, keys_in_blocks):
    monkeypatch.setenv("PESC_REMOTE", bucket.url)
    run_recipe(load_recipe(recipe_file), Store(tmp_path / "data"), Selection(until=("mix",)))
    keys_in_blocks()
    fakes.CALLS.clear()
    for folder in ("first", "second"):  # the second finds no driver of the first's, which would have no keys by now
        parameters = {"recipe": recipe_file, "instance": "base", "store": str(tmp_path / folder)}
        assert stages.download(**parameters, return_state=True).is_completed()
        state = stages.mix(recipe=recipe_file, store=str(tmp_path / folder), return_state=True)
        assert state.is_completed(), state.message
        assert state.result()["mix"].how == "hit"
        assert observe.run_name(state.state_details.flow_run_id) == "mix tiny", "a name asks no bucket"
    assert fakes.CALLS == ["download[base]"]
    assert not set(KEYS) & set(os.environ)


def test_google_s_document_is_a_file_for_the_run_and_gone_afterwards(monkeypatch):
    from prefect.blocks.system import Secret

    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    document = {"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\nof-a-block\n-----END PRIVATE KEY-----\n"}
    for value in (document, json.dumps(document)):
        Secret(value=value).save("google-application-credentials", overwrite=True)
        try:
            with run_secrets():
                path = Path(os.environ["GOOGLE_APPLICATION_CREDENTIALS"])
                assert json.loads(path.read_text()) == document
                assert path.parent.stat().st_mode & 0o077 == 0
        finally:
            Secret.delete("google-application-credentials")
        assert not path.exists()
        assert "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ
        assert "of-a-block" not in redact(f"refused: {document['private_key']}")
