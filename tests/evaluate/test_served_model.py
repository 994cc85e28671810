"""Engine `vllm` without vLLM: the same answers as the other engine from a server that runs the same model, journal, resume, errors.

The real server is in test_vllm_engine.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pesc.errors import EvaluationError
from pesc.evaluate import harness, served_model
from pesc.evaluate.config import BenchmarkConfig, EvaluateConfig
from pesc.evaluate.results import read_result
from pesc.serve.environment import Vllm
from pesc.stage import Execution
from tests.evaluate.builders import QUESTIONS, choice_config, code_config, context
from tests.evaluate.completions_server import PROCESS, TinyServer
from tests.evaluate.test_harness import _damage
from tests.serve.builders import make_fake_python, wait_until_gone

VLLM = Vllm("/env/bin/python", "vllm", "0.33.0", True)


@pytest.fixture
def tiny(model_dir, monkeypatch):
    """A factory: from now on a server of this model stands for vLLM.  Gives the servers that were started."""
    started: list[TinyServer] = []

    def use(model: Path = model_dir) -> list[TinyServer]:
        def starter(_vllm, _place, _dtype, _log):
            def start(max_model_len, stack):
                started.append(stack.enter_context(TinyServer(model, max_model_len)))
                return started[-1]

            return start

        monkeypatch.setattr(served_model, "require_vllm", lambda _python, _device: VLLM)
        monkeypatch.setattr(served_model, "starter", starter)
        return started

    return use


def _run(root, config, model, data):
    ctx = context(root, config, model, data, batch_size=1)
    return harness.build(ctx), ctx


@pytest.mark.parametrize("make", [choice_config, code_config], ids=["scored", "generated"])
def test_a_server_of_the_same_model_gives_the_same_answers(tmp_path, model_dir, data_dir, tiny, make):
    _, alone = _run(tmp_path / "transformers", make(), model_dir, data_dir)
    started = tiny()
    built, served = _run(tmp_path / "vllm", make(engine="vllm"), model_dir, data_dir)
    assert (served.out / "samples.jsonl").read_bytes() == (alone.out / "samples.jsonl").read_bytes()
    expected, found = read_result(alone.out), read_result(served.out)
    assert (found.engine_version, found.settings.engine) == ("vllm 0.33.0", "vllm")
    assert found.model_copy(update={"engine_version": None, "settings": expected.settings}) == expected
    assert built.provenance["engine"] == built.metrics["engine"] == "vllm 0.33.0"
    assert len(started) == 1


def test_the_default_engine_leaves_no_trace_in_keys_and_results(tmp_path, model_dir, data_dir):
    assert "engine" not in choice_config().model_dump(mode="json")
    assert choice_config(engine="vllm").model_dump(mode="json")["engine"] == "vllm"
    _, ctx = _run(tmp_path, choice_config(), model_dir, data_dir)
    assert "engine" not in (ctx.out / "results.json").read_text()


def test_one_word_sets_the_engine_of_all_benchmarks():
    raw = {"tasks": ["boolq", "piqa"], "engine": "vllm", "benchmarks": {"piqa": {"engine": "transformers"}}}
    found = EvaluateConfig.model_validate(raw).benchmarks
    assert {name: row.engine for name, row in found.items()} == {"boolq": "vllm", "piqa": "transformers"}


def _both(model_dir, tmp_path, tiny, model=None):
    """The two engines' language models over one directory."""
    from pesc.evaluate.journal import Journal
    from pesc.evaluate.language_model import load_language_model

    tiny(model or model_dir)
    directory, ignore = model or model_dir, lambda *_: None
    first = load_language_model(directory, device="cpu", dtype="float32", batch_size=1, journal=Journal(tmp_path / "a"), on_progress=ignore)
    work = tmp_path / "work"
    work.mkdir()
    second = served_model.load_served_model(
        directory, device="cpu", dtype="float32", batch_size="auto", seed=1, python=None, work=work, on_progress=ignore
    )
    return first, second


def _instances(kind, rows, task="t"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, row, 0, metadata=(task, number, 1)) for number, row in enumerate(rows)]


def test_windows_marks_and_settings_are_those_of_transformers(tmp_path, model_dir, tiny):
    """Long prompts lose their beginning, long texts are scored in windows, generations end where they should; and the facts are the same."""
    first, second = _both(model_dir, tmp_path, tiny)
    text = " ".join(f"{question} {' '.join(options)}" for question, options, _ in QUESTIONS)
    short, long = text[:90], text * 6
    settings = {"until": ["a"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.7}
    generated = _instances("generate_until", [(short, settings), (long, settings), (long, {"until": [], "max_new_tokens": 6})])
    expected, found = (model.generate_until(generated) for model in (first, second))
    assert found == expected
    assert first.marks == second.marks != {}
    first.marks.clear(), second.marks.clear()
    pairs = _instances("loglikelihood", [(short, " light"), ("", "The sun"), (short + " ", "light"), (long, " light")])
    for (value, greedy), (other, too) in zip(first.loglikelihood(pairs[:3]), second.loglikelihood(pairs[:3]), strict=True):
        assert (value, greedy) == (pytest.approx(other, abs=1e-4), too)
    assert (first.loglikelihood(pairs[3:])[0][0] < 0, second.loglikelihood(pairs[3:])[0][0] < 0) == (True, True)
    assert first.marks == second.marks == {("t", 3): (False, True)}
    rolling = _instances("loglikelihood_rolling", [(short,), (long[:3000],)])
    (one, many), (same, near) = first.loglikelihood_rolling(rolling), second.loglikelihood_rolling(rolling)
    assert one == pytest.approx(same, abs=1e-3)
    assert many == pytest.approx(near, rel=0.01)  # the windows are two tokens shorter
    assert first.facts() == second.facts()
    second.close()


def test_a_prompt_that_is_asked_several_times_is_sampled_anew(tmp_path, model_dir, tiny):
    _, second = _both(model_dir, tmp_path, tiny)
    servers = tiny()
    rows = [("The sun", {"until": [], "max_gen_toks": 3, "do_sample": True, "temperature": 0.8})] * 3
    second.generate_until(_instances("generate_until", rows))
    assert sorted(body["seed"] for body in servers[0].asked) == [1, 2, 3]
    assert {body["temperature"] for body in servers[0].asked} == {0.8}
    second.close()


def test_what_the_server_cannot_do_is_a_sentence(tmp_path, model_dir, tiny):
    _, second = _both(model_dir, tmp_path, tiny)
    with pytest.raises(EvaluationError, match="asks for generations with num_beams: 10, which engine vllm does not offer"):
        second.generate_until(_instances("generate_until", [("The sun", {"until": [], "num_beams": 10})]))
    with pytest.raises(EvaluationError, match="asks for 600 new tokens, but the model has 512 positions"):
        second.generate_until(_instances("generate_until", [("The sun", {"until": [], "max_gen_toks": 600})]))
    server = second._server
    server.max_model_len = 600
    server.answer = lambda body: (400, {"error": {"message": "This model's maximum\ncontext length is 1."}})
    with pytest.raises(EvaluationError, match=r"refused a request of task t: 400 This model's maximum context length is 1\. Set engine"):
        second.loglikelihood(_instances("loglikelihood", [("The sun", " rises")]))
    values = [None, *[-1.0] * 30, -9999.0, -1.0]
    server.answer = lambda body: (200, {"choices": [_echo(values[: 1 + len(body["prompt"][0]) - 2] + values[-2:])]})
    with pytest.raises(EvaluationError, match="logits are not finite numbers"):
        second.loglikelihood(_instances("loglikelihood", [("The sun", " rises")]))
    server.answer = lambda body: (400, {"error": {"message": "Out of range float values are not JSON compliant", "code": 400}})  # vLLM's
    with pytest.raises(EvaluationError, match="logits are not finite numbers"):
        second.loglikelihood(_instances("loglikelihood", [("The sun", " rises")]))
    second.close()


def _echo(values):
    return {"index": 0, "logprobs": {"token_logprobs": values, "top_logprobs": [value and {"x": value} for value in values]}}


@pytest.mark.parametrize("make", [choice_config, code_config], ids=["scored", "generated"])
def test_numbers_that_are_none_are_refused(tmp_path, model_dir, data_dir, tiny, make):
    tiny(_damage(model_dir, tmp_path / "model"))
    with pytest.raises(EvaluationError, match=r"not finite numbers \(task pesc_\w+, at or after item \d, dtype float32\)"):
        _run(tmp_path / "run", make(engine="vllm"), tmp_path / "model", data_dir)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A Python whose vLLM is `PROCESS`; the lines of the file are the requests that it answered."""
    monkeypatch.setenv("PESC_VLLM", str(make_fake_python(tmp_path, PROCESS, vllm="0.33.0")))
    monkeypatch.setenv("FAKE_ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("PESC_TEST_MARK", tmp_path.name)
    return tmp_path / "asked"


def _auto(root, config, model, data):
    ctx = context(root, config, model, data)
    return dataclasses.replace(ctx, execution=Execution(device="auto", evaluate_batch_size=2))


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_a_server_that_ends_half_way_leaves_its_answers_and_the_next_run_asks_the_rest(tmp_path, model_dir, data_dir, fake, monkeypatch):
    monkeypatch.setitem(served_model.CONTEXTS, "loglikelihood", 1)
    config = choice_config(engine="vllm")
    whole = _auto(tmp_path / "whole", config, model_dir, data_dir)
    harness.build(whole)
    total = _lines(fake)
    assert total == sum(len(options) for _, options, _ in QUESTIONS)
    fake.unlink()

    monkeypatch.setenv("FAKE_ENDS_AFTER", str(total // 2))
    broken = _auto(tmp_path / "broken", config, model_dir, data_dir)
    ended = r"ended in the middle of task pesc_openbookqa: vLLM ended with exit code 1 while it served: .*illegal memory access.*kept"
    with pytest.raises(EvaluationError, match=ended):
        harness.build(broken)
    assert list(broken.out.iterdir()) == []
    kept = _lines(next(broken.work.glob("served-*.jsonl")))
    assert 0 < kept < len(QUESTIONS)
    assert "illegal memory access" in (broken.work / "vllm.log").read_text()
    fake.unlink()

    monkeypatch.delenv("FAKE_ENDS_AFTER")
    harness.build(broken)
    assert _lines(fake) == total * (len(QUESTIONS) - kept) // len(QUESTIONS)
    for name in ("results.json", "samples.jsonl"):
        assert (broken.out / name).read_bytes() == (whole.out / name).read_bytes()

    monkeypatch.setattr(served_model, "BackgroundServer", lambda *_, **__: pytest.fail("nothing is left to ask"))
    harness.build(broken)
    monkeypatch.delenv("PESC_TEST_MARK")
    assert wait_until_gone(f"PESC_TEST_MARK={tmp_path.name}", 5) == []


def test_a_server_that_does_not_start_is_a_sentence_with_the_end_of_its_log(tmp_path, model_dir, data_dir, fake, monkeypatch):
    monkeypatch.setenv("FAKE_NO_START", "1")
    with pytest.raises(EvaluationError) as caught:
        harness.build(_auto(tmp_path / "run", choice_config(engine="vllm"), model_dir, data_dir))
    first, *tail = str(caught.value).splitlines()
    log = tmp_path / "run/work/vllm.log"
    assert first == (
        "Engine vllm did not start: vLLM ended with exit code 3 before it answered: ValueError: the KV cache is too small for the model's "
        f"longest text. Its log: {log} The end of that log:"
    )
    assert tail == ["INFO: loading", "ValueError: the KV cache is too small for the model's longest text"]


def test_no_vllm_and_one_for_another_device_are_sentences(tmp_path, model_dir, data_dir, fake, monkeypatch):
    config = choice_config(engine="vllm")
    wrong = r"execution.device is cpu, but the vLLM at .*/python is a build for GPUs: set PESC_VLLM to another environment"
    with pytest.raises(EvaluationError, match=wrong):
        harness.build(context(tmp_path / "device", config, model_dir, data_dir))
    monkeypatch.delenv("PESC_VLLM")
    none = r"evaluate.engine is vllm, but .* has no vLLM: install it in an environment of its own .*Or set evaluate.engine: transformers."
    with pytest.raises(EvaluationError, match=none):
        harness.build(context(tmp_path / "none", config, model_dir, data_dir))


PROGRAM = """
import dataclasses, sys
from pathlib import Path
from pesc.evaluate import harness
from pesc.stage import Execution
from tests.evaluate.builders import choice_config, context
ctx = context(Path(sys.argv[1]), choice_config(engine="vllm"), Path(sys.argv[2]), Path(sys.argv[3]))
harness.build(dataclasses.replace(ctx, execution=Execution(evaluate_batch_size=2)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_server_dies_with_the_stage(tmp_path, model_dir, data_dir, fake, monkeypatch, number):
    repository = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repository), "TMPDIR": str(tmp_path), "FAKE_SECONDS": "60"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(model_dir), str(data_dir)]
    process = subprocess.Popen(command, cwd=repository, env=environment)
    deadline = time.monotonic() + 300
    while not fake.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(60)
    monkeypatch.delenv("PESC_TEST_MARK")
    assert wait_until_gone(f"PESC_TEST_MARK={tmp_path.name}", 20) == []


def test_the_page_names_the_engine():
    from pesc.evaluate.report import _settings
    from tests.evaluate.builders import make_result

    config = BenchmarkConfig(task="mmlu", metric="acc", engine="vllm")
    assert _settings(make_result([1, 0], settings=config, engine_version="vllm 0.33.0"))["engine"] == "vllm 0.33.0"
    assert "engine" not in _settings(make_result([1, 0]))
    assert json.loads(make_result([1, 0]).model_dump_json()).get("engine_version") is None
