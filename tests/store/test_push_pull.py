"""`pesc push`, `pesc pull` and the others that know of a remote, as a user meets them."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pesc.cli import app
from pesc.errors import RecipeError, RemoteError, StoreError
from pesc.plan import Selection
from pesc.recipe import load_recipe
from pesc.run import run_recipe
from pesc.store import Store
from pesc.store import remote as remote_module
from pesc.store.maintenance import fsck
from tests.fake_stages import tiny_recipe_dict
from tests.store.builders import made

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path, fakes):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe_dict(tmp_path / "sources")))
    return str(path)


def run_some(recipe, store, *overrides):
    """Three actions: download[rows], dedup, mix."""
    return run_recipe(load_recipe(recipe, overrides), store, Selection(until=("mix",)))


@pytest.fixture
def remote(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_OPEN", {})
    (tmp_path / "remote").mkdir()
    return str(tmp_path / "remote")


@pytest.fixture
def pesc(store):
    """Runs a command on the store; gives what it printed."""

    def run(*words, root=None):
        result = CliRunner().invoke(app, [str(word) for word in (*words, *([] if "--store" in words else ["--store", root or store.root]))])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def numbers(text):
    """`(3, 12, 5)` of `Sent 3 of 12 actions: 5 files, ...`."""
    return tuple(map(int, re.search(r"(\d+) of (\d+) actions: (\d+) files", text).groups()))


def test_a_dry_run_says_what_a_push_then_does_and_a_second_push_does_nothing(recipe, store, remote, pesc):
    outcomes = run_some(recipe, store)
    would = pesc("push", "--remote", remote, "--dry-run")
    assert not list(Path(remote).iterdir())
    did = pesc("push", "--remote", remote)
    assert numbers(would) == numbers(did)
    assert numbers(did)[:2] == (len(outcomes), len(outcomes))
    assert would.splitlines()[-1].replace("Would send", "Sent") == did.splitlines()[-1]
    assert numbers(pesc("push", "--remote", remote)) == (0, len(outcomes), 0)
    assert not [p for p in (store.root / "work").rglob("*") if p.is_file()]


def test_a_recipe_an_action_or_digits_choose(recipe, store, remote, pesc, tmp_path):
    outcomes = run_some(recipe, store)
    other = made(store, {"data": b"of another recipe"}, stage="upcycle")
    assert numbers(pesc("push", recipe, "--remote", remote, "--dry-run"))[:2] == (3, 3)
    assert pesc("push", f"{recipe}:dedup", "--remote", remote).splitlines()[0] == "sent dedup"
    assert numbers(pesc("push", other.fingerprint[:8], "--remote", remote))[:2] == (1, 1)
    assert numbers(pesc("push", outcomes["mix"].ref.digest[:10], "--remote", remote))[:2] == (1, 1)
    there = tmp_path / "there"
    assert numbers(pesc("pull", other.output.digest[:8], "--remote", remote, "--dry-run", root=there)) == (1, 1, 1)
    assert not there.exists()
    assert numbers(pesc("pull", other.fingerprint[:8], "--remote", remote, root=there)) == (1, 1, 1)
    assert numbers(pesc("pull", "--remote", remote, root=there))[:2] == (2, 3)
    assert fsck(Store(there)).is_clean


def test_a_recipe_is_pulled_with_its_overrides(recipe, store, remote, pesc, tmp_path, fakes):
    run_some(recipe, store, "mix.total=7")
    pesc("push", "--remote", remote)
    there = tmp_path / "there"
    assert numbers(pesc("pull", recipe, "mix.total=7", "--remote", remote, root=there))[:2] == (3, 3)
    fakes.CALLS.clear()
    run_some(recipe, Store(there), "mix.total=7")
    assert fakes.CALLS == []


def test_a_differing_result_is_named_and_the_first_one_stands(store, remote, pesc, tmp_path):
    first, second = made(store, {"data": b"first"}), made(Store(tmp_path / "there"), {"data": b"second"})
    pesc("push", "--remote", remote)
    for options in (("--dry-run",), ()):
        said = pesc("push", "--remote", remote, *options, root=tmp_path / "there")
        assert f"differs: mix {first.fingerprint[:12]}: {remote} has the object {first.output.digest[:12]}" in said
        assert numbers(said) == (0, 1, 0)
    assert Store(tmp_path / "there").find("mix", second.fingerprint) == second, "a push changes nothing here"


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (["push"], StoreError, "There is no remote: give --remote URL, or set PESC_REMOTE"),
        (["push", "--remote", "/not/mounted"], RemoteError, "no such directory"),
        (["push", "--remote", "ftp://x/y"], RemoteError, "unknown scheme"),
        (["push", "abcdef12", "--remote", "REMOTE"], StoreError, "Nothing of abcdef12 is in"),
        (["push", "RECIPE", "--remote", "REMOTE"], StoreError, "Nothing of .*tiny.yaml is in .*pesc plan"),
        (["pull", "RECIPE:train[moe]", "--remote", "REMOTE"], RecipeError, r"has no action 'train\[moe\]'"),
        (["push", "dmo", "--remote", "REMOTE"], RecipeError, "Did you mean 'demo'"),
    ],
)
def test_a_mistake_is_a_sentence(words, error, told, recipe, remote, pesc):
    with pytest.raises(error, match=told):
        pesc(*(word.replace("RECIPE", recipe).replace("REMOTE", remote) for word in words))


def test_gc_keeps_what_a_recipe_hits_when_its_inputs_are_only_in_the_remote(recipe, store, remote, pesc, tmp_path, monkeypatch):
    monkeypatch.setenv("PESC_REMOTE", remote)
    outcomes = run_some(recipe, Store(store.root))
    there = Store(tmp_path / "there")
    there.open(outcomes["mix"].ref)
    assert "would remove" not in pesc("gc", "--keep-recipe", recipe, "--keep-days", 0, root=there.root)
    assert "would remove" in pesc("gc", "--keep-days", 0, root=there.root)  # nobody has run it there
    pesc("gc", "--keep-days", 0, "--delete", root=there.root)
    assert there.alone().find("mix", outcomes["mix"].ref.fingerprint) is None
    assert there.find("mix", outcomes["mix"].ref.fingerprint), "the remote still has it"
    assert (there.open(outcomes["mix"].ref) / "data.json").exists()


def test_a_plan_says_what_only_the_remote_has(recipe, store, remote, pesc, tmp_path, monkeypatch):
    monkeypatch.setenv("PESC_REMOTE", remote)
    run_some(recipe, Store(store.root))
    text = pesc("plan", recipe, root=tmp_path / "there")
    assert text.count(f", in {remote}") == 3
    assert "3 HIT" in text
    assert ", in /" not in pesc("plan", recipe)
    assert f"(to be pulled from {remote})" in pesc("explain", recipe, "mix", root=tmp_path / "there")


def cli(*words, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "pesc.cli", *words], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def test_a_plan_without_its_remote_says_so_and_goes_on(bucket, tmp_path):
    started = time.monotonic()
    done = cli("plan", "demo", "--store", str(tmp_path / "store"), PESC_REMOTE=bucket.url, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert time.monotonic() - started < 15
    assert done.returncode == 0
    assert re.match(rf"pesc: The remote {bucket.url} did not answer \(.*What follows is of .* alone\.\n", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert "RUN" in done.stdout
    run = cli("run", "demo", "--only", "download[human-eval]", "--store", str(tmp_path / "s"), PESC_REMOTE=str(tmp_path / "unmounted"))
    assert run.returncode == 1
    assert run.stderr.startswith("pesc: The remote ")
    assert "Traceback" not in run.stderr


def test_a_plan_without_a_remote_imports_nothing_of_it():
    code = "import sys; from pesc.cli import app; print([m for m in ('fsspec', 's3fs', 'pesc.store.remote', 'pesc.mirror') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_migrate_says_what_it_did(store, pesc):
    made(store, {"data": b"x"}, records={"log.txt": b"l"})
    (store.root / "format").unlink()
    assert pesc("migrate") == f"format 1 → 2: manifests list the records beside them (0 changed)\n{store.root} has format 2.\n"
    assert pesc("migrate") == f"{store.root} has format 2.\n"
