"""Names that come from elsewhere lead to no place outside of the folder that they belong to."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pesc.data.config import SourceConfig
from pesc.data.sources import wanted_files
from pesc.errors import SourceError, StoreError
from pesc.store import ArtifactRef
from pesc.store.manifest import Output, OutputFile

OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "./x", "a/./b", "a\0b"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_manifest_names_no_file_outside_of_its_object(path):
    with pytest.raises(ValidationError, match="outside of its folder"):
        OutputFile(path=path, size=1, sha256="0" * 64)


@given(
    st.lists(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(lambda s: s not in (".", "..")),
        min_size=1,
    )
)
def test_any_other_name_is_a_file(parts):
    assert OutputFile(path="/".join(parts), size=1, sha256="0").path == "/".join(parts)


@pytest.mark.parametrize("name", ["../../etc", "/etc", "..", ".", "", "a/b", "a\0"])
def test_stages_fingerprints_and_digests_are_names(name):
    good = {"stage": "mix", "fingerprint": "f" * 64, "digest": "d" * 64, "size_bytes": 1}
    for field in ("stage", "fingerprint", "digest"):
        with pytest.raises(ValidationError, match="no name of a directory"):
            ArtifactRef(**{**good, field: name})
    with pytest.raises(ValidationError, match="no name of a directory"):
        Output(digest=name, size_bytes=1, files=[])


def test_a_manifest_that_leads_outside_is_damaged(fakes, store, tiny_recipe):
    from pesc.plan import Selection
    from pesc.run import run_recipe

    ref = run_recipe(tiny_recipe(), store, Selection(until=("mix",)))["mix"].ref
    path = store.action_path("mix", ref.fingerprint) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["output"]["digest"] = "../../../../etc"
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="is damaged"):
        store.manifest("mix", ref.fingerprint)
    assert list(store.manifests("mix")) == []


@pytest.mark.parametrize("listed", ["../evil", "a/../../evil", "/evil"])
def test_a_source_that_lists_a_file_outside_is_refused(listed):
    """What a hub, a bucket or a folder on a server says it holds."""
    with pytest.raises(SourceError, match="written outside of its folder"):
        wanted_files(SourceConfig(uri="hub:a/b@main"), ["rows.json", listed], "Source 'x'")
