import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pesc.errors import StoreError
from pesc.store.digest import canonical_json, digest_file, digest_json, digest_tree

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def _utf8(value) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@given(st.dictionaries(st.text(), json_values).filter(_utf8))
def test_canonical_json_ignores_the_order_of_keys(value):
    shuffled = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(shuffled)
    assert json.loads(canonical_json(value)) == value


def test_digest_json_is_sha256_of_the_canonical_text():
    assert digest_json({"b": 1, "a": [True, None, "é"]}) == hashlib.sha256('{"a":[true,null,"é"],"b":1}'.encode()).hexdigest()


def test_nan_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_json({"x": float("nan")})


def _write(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_tree_digest_depends_on_names_and_bytes_alone(tmp_path):
    files = {"a.txt": b"1", "sub/b.bin": b"\0\1", "sub/c": b""}
    first = _write(tmp_path / "first", files)
    second = _write(tmp_path / "second", dict(reversed(files.items())))
    (second / "empty").mkdir()
    (second / "a.txt").chmod(0o400)
    digest, entries = digest_tree(first)
    assert digest == digest_tree(second)[0]
    assert [(e.path, e.size) for e in entries] == [("a.txt", 1), ("sub/b.bin", 2), ("sub/c", 0)]
    assert entries[0].sha256 == digest_file(first / "a.txt") == hashlib.sha256(b"1").hexdigest()


@pytest.mark.parametrize("changed", [{"a.txt": b"2"}, {"b.txt": b"1"}, {"a.txt": b"1", "b": b""}])
def test_tree_digest_sees_every_change(tmp_path, changed):
    assert digest_tree(_write(tmp_path / "x", {"a.txt": b"1"}))[0] != digest_tree(_write(tmp_path / "y", changed))[0]


def test_links_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="link"):
        digest_tree(tmp_path)
