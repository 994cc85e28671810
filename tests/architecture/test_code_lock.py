"""Whoever changes a stage decides whether its results change."""

from pesc import code_lock, pipeline


def test_stage_sources_match_the_lock():
    assert code_lock.lock_problems() == []


def test_every_declared_source_exists():
    for stage in pipeline.STAGES:
        for module in stage.sources:
            files = code_lock._module_files(module)
            assert files, module
            assert all(path.is_file() for path in files), module


def test_comments_docstrings_and_formatting_do_not_count(tmp_path):
    def normalised(text):
        path = tmp_path / "module.py"
        path.write_text(text)
        return code_lock._normalised(path)

    plain = normalised("def f(x):\n    return x + 1\n")
    assert plain == normalised('"""Doc."""\n\n\ndef f( x ):  # why\n    """What."""\n    return (x + 1)\n')
    assert plain != normalised("def f(x):\n    return x + 2\n")


def test_a_change_without_a_decision_is_a_sentence(tmp_path, monkeypatch):
    lock = code_lock.current_lock()
    lock["mix"]["sources"] = "0" * 64
    lock["train"]["code_version"] = 0
    monkeypatch.setattr(code_lock, "read_lock", lambda: lock)
    mix, train = code_lock.lock_problems()
    assert "The sources of `mix` changed" in mix
    assert "pesc dev lock" in mix
    assert "code_version" in train
