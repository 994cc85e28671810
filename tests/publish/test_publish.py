"""`pesc publish` with the real client of the hub against a server that speaks the hub's API."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys

import pytest

from tests.data.builders import tree_bytes
from tests.data.test_hub import fetch
from tests.publish.builders import CARD, LITTER, SHARD_BYTES, file_bytes, litter, save_model
from tests.publish.conftest import environment
from tests.publish.writable_hub import READER


def test_a_model_is_published_whole_and_comes_back_byte_for_byte(tmp_path, hub, publish):
    model = save_model(tmp_path / "model")
    litter(model)
    hub.part_bytes = 4 << 20  # as the hub asks for large files
    code, out, err = publish(model)
    assert code == 0, err
    assert hub.tree("org/model") == file_bytes(model)
    assert [(c["repo"], c["branch"], c["oid"]) for c in hub.commits] == [("org/model", "main", hub.commit)]
    assert "Publish a model with pesc" in hub.commits[0]["summary"]
    assert str(tmp_path) not in json.dumps(hub.commits)
    assert f"{hub.url}/org/model" in out
    assert f"commit {hub.commit}: the hub lists all 15 files with the digests that they have here" in out
    for name, reason in LITTER.items():
        assert f"stays here: {name} ({reason}" in out
    assert not any(b"hf_secret" in data for data in hub.tree("org/model").values())
    (answer,) = fetch(tmp_path / "back", hub.url, {"uri": "hub:org/model@main"})
    assert answer["provenance"]["revision"] == hub.commit
    assert tree_bytes(tmp_path / "back/0/out") == file_bytes(model)


def test_again_sends_nothing_and_a_change_sends_itself_alone(tmp_path, hub, publish):
    model = save_model(tmp_path / "model")
    assert publish(model)[0] == 0
    first, puts = hub.commit, len(hub.puts)
    code, out, _ = publish(model)
    assert (code, hub.commit, len(hub.commits), len(hub.puts)) == (0, first, 1, puts)
    assert f"commit {first} (all was there already)" in out
    (model / "README.md").write_text(CARD + "\nMore words.\n")
    assert publish(model, "--message", "More words")[0] == 0
    assert len(hub.puts) == puts
    assert hub.commits[-1]["summary"] == "More words"
    assert hub.tree("org/model") == file_bytes(model)


def test_a_killed_upload_leaves_no_commit_and_the_next_run_goes_on(tmp_path, hub, publish):
    model = save_model(tmp_path / "model")
    hub.stalled_after = 1
    command = [sys.executable, "-m", "pesc.cli", "publish", str(model), "--repo", "org/model", "--yes"]
    process = subprocess.Popen(command, env=environment(hub.url, tmp_path / "hf"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert hub.stalled.wait(60), process.stderr.read()
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert hub.commits == []
    assert hub.tree("org/model") == {}
    (kept,) = hub.stored
    hub.release.set()
    hub.stalled_after, hub.puts = None, []
    code, _, err = publish(model)
    assert code == 0, err
    assert len(hub.puts) == 2
    assert not any(kept in put for put in hub.puts), "what had arrived is not sent again"
    assert hub.tree("org/model") == file_bytes(model)


@pytest.mark.slow  # the client tries for half a minute
@pytest.mark.long
def test_a_network_that_goes_away_says_what_was_sent(tmp_path, hub, publish):
    model = save_model(tmp_path / "model")
    hub.dead_after = 1
    code, _, err = publish(model)
    assert code == 1
    assert "there is no network to the hub, or it was cut" in err
    assert "1 of 3 large files were sent and are kept by the hub, the repository is as it was; the same command" in err
    assert hub.commits == []
    hub.dead_after, hub.puts = None, []
    assert publish(model)[0] == 0
    assert len(hub.puts) == 2
    assert hub.tree("org/model") == file_bytes(model)


def test_a_hub_with_xet_storage_is_served_by_it(tmp_path, hub):
    """As the public hub is; hf_xet keeps the chunks in a directory here.  In a process of its own: the client remembers its way."""
    model = save_model(tmp_path / "model", 2)
    hub.xet = str(tmp_path / "cas")
    command = [sys.executable, "-m", "pesc.cli", "publish", str(model), "--repo", "org/model", "--yes"]
    done = subprocess.run(command, env=environment(hub.url, tmp_path / "hf"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.puts == []
    assert hub.tree("org/model") == file_bytes(model)


def test_weights_of_an_earlier_model_go_with_the_same_commit(tmp_path, hub, publish):
    """transformers reads model.safetensors before an index, and an adapter's settings before both."""
    hub.push("b" * 40, {("model", "org/model"): {"model.safetensors": b"old", "adapter_config.json": b"{}", "sample.txt": b"kept"}})
    model = save_model(tmp_path / "model", 2)
    code, out, err = publish(model)
    assert code == 0, err
    assert hub.tree("org/model") == file_bytes(model) | {"sample.txt": b"kept"}
    assert len(hub.commits) == 1
    for name in ("model.safetensors", "adapter_config.json"):
        assert f"will be removed there: {name} (it would be loaded in place of this model; it stays in the history)" in out


def test_a_branch_is_made_and_main_stays(tmp_path, hub, publish):
    small, other = save_model(tmp_path / "small", 1, 64), save_model(tmp_path / "other", 1, 64, seed=1)
    assert publish(small)[0] == 0
    code, out, err = publish(other, "--revision", "trial")
    assert code == 0, err
    assert hub.tree("org/model") == file_bytes(small)
    assert hub.tree("org/model", "trial") == file_bytes(other)
    assert f"{hub.url}/org/model/tree/trial" in out


def test_private_is_private_or_refused(tmp_path, hub, publish):
    small = save_model(tmp_path / "small", 1, 64)
    code, out, _ = publish(small, "--private")
    assert (code, hub.private) == (0, {"org/model"})
    assert "will be made (private)" in out
    assert publish(small, repo="org/open")[0] == 0
    before = len(hub.commits)
    code, _, err = publish(small, "--private", repo="org/open")
    assert code == 1
    assert "org/open is public, and --private does not hide what is there" in err
    assert len(hub.commits) == before


def test_a_dry_run_asks_the_hub_nothing(tmp_path, hub, publish):
    small = save_model(tmp_path / "small", 1, 64)
    code, out, _ = publish(small, "--dry-run", token=None)
    assert code == 0
    assert "in 13 files; licence: apache-2.0" in out
    assert "A dry run: nothing was sent to org/model" in out
    assert hub.requests == []


def test_nobody_to_ask_is_no_consent(tmp_path, hub, worker):
    code, _, err = worker("publish", save_model(tmp_path / "small", 1, 64), "--repo", "org/model")
    assert code == 1
    assert "add --yes" in err
    assert ("model", "org/model") not in hub.files


@pytest.fixture
def refuses(hub, publish):
    """The command ends with one sentence, and nothing has been written to the hub."""

    def run(part, directory, *options, **more):
        before = dict(hub.files)
        code, _, err = publish(directory, *options, **more)
        assert code == 1, err
        message = err.strip().splitlines()[-1]
        assert message.startswith("pesc: ")
        assert part in message
        assert (hub.files, hub.puts, hub.commits) == (before, [], [])

    return run


@pytest.mark.parametrize("name", ["model", "datasets/org/model", "org/a/b", "org/..", "org/mo del", "/model"])
def test_a_name_that_is_none(tmp_path, refuses, name):
    refuses(f"--repo {name} is no ", tmp_path / "whatever", repo=name)


def test_who_may_not_write_is_told_so(tmp_path, hub, refuses):
    small = save_model(tmp_path / "small", 1, 64)
    refuses("There is no token for the hub. Log in with `hf auth login`, or set HF_TOKEN", small, token=None)
    refuses("The hub refuses access to org/model (HTTP 403) (Forbidden: you must use a write token)", small, token=READER)
    refuses("The hub refuses access to org/model (HTTP 401)", small, token="hf_made_up")
    refuses("The hub refuses access to rivals/model (HTTP 403) (You have no rights to rivals)", small, repo="rivals/model")
    hub.files["dataset", "org/rows"] = {"a": b""}
    refuses("org/rows is a data set on the hub, not a model", small, repo="org/rows")


def test_a_directory_that_is_not_whole(tmp_path, hub, refuses):
    refuses("There is no directory", tmp_path / "none")
    model = save_model(tmp_path / "model", 2, 64)
    (model / "training.json").write_text("{}")
    refuses("holds what training changed, not a whole model: merge it first", model)
    (model / "training.json").unlink()
    shard = model / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refuses("is not a whole safetensors file (its length is not what the header says)", model)
    shard.unlink()
    refuses("names the shard model-00002-of-00002.safetensors, but it is not there", model)
    shard.write_bytes(whole)
    (model / "parts_of_it.py").unlink()
    refuses("names the code parts_of_it.py, but it is not there", model)
    assert hub.requests == [], "all of this is found before the hub is asked"


CARDS = {
    None: "has no model card (README.md), which says under which licence the model may be used. For a model of the store, `pesc export",
    "# no head": "states no licence",
    "---\ntags: [x]\n---\n": "states no licence",
    "---\nlicense: [\n---\n": "cannot be read",
    "---\nlicense: other\n---\n": "has `license: other` without saying which",
    "---\nlicense: other\nlicense_name: not stated\n---\n": "has `license: other` without saying which",
}


def test_a_card_without_a_licence(tmp_path, hub, refuses):
    model = save_model(tmp_path / "model", 1, 64)
    for text, message in CARDS.items():
        (model / "README.md").unlink(missing_ok=True)
        if text is not None:
            (model / "README.md").write_text(text)
        refuses(message, model)
    assert hub.requests == []


def test_what_the_hub_lists_is_compared_with_what_is_here(tmp_path, hub, publish):
    model = save_model(tmp_path / "model", 2, 64)
    hub.damages = {"model-00002-of-00002.safetensors", "config.json"}
    code, out, err = publish(model)
    assert code == 1
    assert "The hub lists other bytes than are here for config.json, model-00002-of-00002.safetensors in the commit" in err
    assert "the digests that they have here" not in out
    hub.damages, hub.ignores = set(), {"model-00001-of-00002.safetensors"}
    (model / "model-00001-of-00002.safetensors").write_bytes(
        save_model(tmp_path / "b", 2, 64, 5).joinpath("model-00001-of-00002.safetensors").read_bytes()
    )
    assert publish(model, repo="org/ignoring")[0] == 1
    assert "model-00001-of-00002.safetensors" not in hub.tree("org/ignoring")


def test_a_commit_of_somebody_else_in_between_is_not_written_over(tmp_path, hub, publish):
    model = save_model(tmp_path / "model", 1, 64)
    assert publish(model)[0] == 0
    hub.status["commit org/model"] = 412
    (model / "LICENSE").write_text("changed")
    code, _, err = publish(model)
    assert code == 1
    assert "Somebody else changed org/model in the meantime (HTTP 412)" in err


def test_without_a_connection_nothing_begins(tmp_path):
    model = save_model(tmp_path / "model", 1, 64)
    command = [sys.executable, "-m", "pesc.cli", "publish", str(model), "--repo", "org/model", "--yes"]
    done = subprocess.run(command, env=environment("http://127.0.0.1:9", tmp_path / "hf"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        "org/model cannot be published: there is no network to the hub, or it was cut. Check the connection. The repository is as it was"
        in done.stderr
    )


def test_the_digests_are_the_hubs(tmp_path):
    from pesc.publish.contents import Contents
    from pesc.publish.repository import hash_files

    (tmp_path / "a").write_bytes(b"what is up, doc?")
    found = hash_files(Contents(tmp_path, ("a",), {}), lambda *_a, **_k: None)["a"]
    assert found.sha256 == hashlib.sha256(b"what is up, doc?").hexdigest()
    assert found.git == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # the example of the book Pro Git
    assert SHARD_BYTES > 5_000_000
