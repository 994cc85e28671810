"""`auto` measures once, tells, remembers, and leaves no trace in the caller's graph."""

import logging
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pesc.moe import dispatch, tuning
from pesc.moe.dispatch import PATHS, run_adapters
from tests.moe.test_dispatch import make_case


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_paths", {})


@pytest.fixture
def calls(monkeypatch):
    """How often each path ran, and where; `dense` is made the slow one."""
    seen = []

    def watched(name, path):
        def run(*tensors):
            seen.append((name, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            time.sleep(0.02 if name == "dense" else 0)
            return path(*tensors)

        return run

    monkeypatch.setattr(dispatch, "PATHS", {name: watched(name, path) for name, path in PATHS.items()})
    return seen


def test_the_fastest_is_measured_once_logged_and_recorded(calls, caplog):
    case = make_case(64, 4, 2, 8, 16)
    with caplog.at_level(logging.INFO, logger="pesc"):
        run_adapters(*case)
    assert {name for name, *_ in calls} == {"dense", "grouped", "segments"}
    (choice,) = tuning.export_choices()
    assert choice["path"] != "dense"
    assert choice["milliseconds"]["dense"] >= 20
    assert {name: choice[name] for name in ("device", "dtype", "num_experts", "adapter_dim", "tokens", "gradients")} == {
        "device": "cpu", "dtype": "float32", "num_experts": 4, "adapter_dim": 8, "tokens": 64, "gradients": False,
    }  # fmt: skip
    assert f"dispatch {choice['path']} for 4 experts of width 8, up to 64 tokens in float32 on cpu (ms: dense 2" in caplog.text
    calls.clear()
    run_adapters(*make_case(40, 4, 2, 8, 16))  # the same power of two
    assert [name for name, *_ in calls] == [choice["path"]]


@pytest.mark.parametrize(
    "other", [dict(tokens=65), dict(width=12), dict(experts=5), dict(dtype=torch.float64)], ids=["tokens", "width", "experts", "dtype"]
)
def test_another_shape_or_dtype_is_measured_anew(other):
    shape = dict(tokens=64, experts=4, top_k=2, width=8, hidden=16)
    run_adapters(*make_case(**shape))
    run_adapters(*make_case(**(shape | other)))
    assert len(tuning.export_choices()) == 2


def test_gradients_are_another_choice_and_measured_with_their_backward_pass(calls):
    y, *rest = make_case(64, 4, 2, 8, 16)
    with torch.no_grad():
        run_adapters(y, *rest)
    run_adapters(y.requires_grad_(), *rest).sum().backward()
    assert [choice["gradients"] for choice in tuning.export_choices()] == [False, True]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_measuring_does_not_depend_on_the_mode_of_the_caller(mode):
    with mode():
        case = make_case(64, 4, 2, 8, 16)
        case[1].requires_grad_(mode is torch.enable_grad)
        assert torch.allclose(run_adapters(*case), run_adapters(*case, mode="reference"), atol=1e-5)


def test_measuring_inside_activation_checkpointing_leaves_no_trace():
    """Tensors saved by a measurement inside the checkpoint would be missing from its recomputation."""
    y, down, up, index, weight = make_case(64, 4, 2, 8, 16)
    leaves = [tensor.requires_grad_() for tensor in (y, down, up, weight)]
    out = checkpoint(lambda: run_adapters(*leaves[:3], index, leaves[3]), use_reentrant=False)
    gradients = torch.autograd.grad(out.sum(), leaves)
    wanted = torch.autograd.grad(run_adapters(*leaves[:3], index, leaves[3], mode="reference").sum(), leaves)
    assert all(torch.allclose(got, want, atol=1e-4) for got, want in zip(gradients, wanted, strict=True))


def test_measuring_uses_the_callers_number_of_threads(monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "_measure", lambda *_: (seen.append(torch.get_num_threads()), ("dense", {}))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_adapters(*make_case(64, 4, 2, 8, 16))
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_a_path_without_room_is_left_out_and_only_all_of_them_are_an_error(monkeypatch):
    def lacking(*_):
        raise torch.OutOfMemoryError("no memory for this")

    case = make_case(64, 4, 2, 8, 16)
    monkeypatch.setattr(dispatch, "PATHS", PATHS | {"dense": lacking})
    assert torch.allclose(run_adapters(*case), run_adapters(*case, mode="reference"), atol=1e-5)
    assert "dense" not in tuning.export_choices()[0]["milliseconds"]
    tuning.forget_choices()
    monkeypatch.setattr(dispatch, "PATHS", dict.fromkeys(PATHS, lacking))
    with pytest.raises(torch.OutOfMemoryError, match="no memory for this"):
        run_adapters(*case)


def test_any_other_error_while_measured_is_the_callers(monkeypatch):
    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(dispatch, "PATHS", PATHS | {"dense": broken})
    with pytest.raises(RuntimeError, match="a defect"):
        run_adapters(*make_case(64, 4, 2, 8, 16))


def test_threads_with_one_key_measure_once(calls):
    from concurrent.futures import ThreadPoolExecutor

    case = make_case(64, 4, 2, 8, 16)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_adapters(*case), range(4)))
    assert sum(name == "dense" for name, *_ in calls) <= 2 + tuning._REPEATS  # one warm-up, one measurement
    assert len(tuning.export_choices()) == 1


def test_nothing_is_measured_inside_a_backward_pass():
    """Reentrant checkpointing recomputes there: on CUDA a measurement would wait for the thread that waits for it."""
    y, down, up, index, weight = make_case(64, 4, 2, 8, 16)
    leaves = [tensor.requires_grad_() for tensor in (y, down, up, weight)]
    out = checkpoint(lambda y: run_adapters(y, *leaves[1:3], index, leaves[3]), y, use_reentrant=True)
    before = tuning.export_choices()
    out.sum().backward()
    assert tuning.export_choices() == before
    assert all(leaf.grad.any() for leaf in leaves)


def test_known_choices_do_not_reach_into_traces_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    y, down, up, index, weight = make_case(2, 4, 2, 8, 16)
    run_adapters(y, down, up, index, weight)
    traced = torch.jit.trace(lambda y, index, weight: run_adapters(y, down, up, index, weight), (y, index, weight))
    other = make_case(2, 4, 2, 8, 16, seed=9)
    expected = run_adapters(other[0], down, up, *other[3:], mode="reference")
    assert torch.allclose(traced(other[0], *other[3:]), expected, atol=1e-5)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (y, down, up, index, weight)]
        assert run_adapters(*fake).shape == (2, 16)


def test_a_gate_that_alone_wants_a_gradient_is_training():
    y, down, up, index, weight = make_case(2, 4, 2, 8, 16)
    run_adapters(y, down, up, index, weight)
    out = run_adapters(y, down, up, index, weight.requires_grad_())
    assert [choice["gradients"] for choice in tuning.export_choices()] == [False, True]
    assert "gathered" not in tuning.export_choices()[1]["milliseconds"]
    out.sum().backward()
    assert weight.grad.any()


def test_a_continuation_takes_the_choices_of_before(calls):
    case = make_case(64, 4, 2, 8, 16)
    run_adapters(*case)
    exported = tuning.export_choices()
    exported[0]["path"] = "dense"  # as if it had been the fastest then
    tuning.forget_choices()
    tuning.adopt_choices(exported)
    calls.clear()
    run_adapters(*case)
    assert [name for name, *_ in calls] == ["dense"]
    assert tuning.export_choices() == exported


def test_a_choice_that_cannot_run_here_is_measured_again():
    case = make_case(64, 4, 2, 8, 16)
    run_adapters(*case)
    exported = tuning.export_choices()
    exported[0]["path"] = "a path of a later version"
    tuning.forget_choices()
    tuning.adopt_choices(exported)
    assert torch.allclose(run_adapters(*case), run_adapters(*case, mode="reference"), atol=1e-5)


def test_nothing_is_measured_for_no_tokens_or_without_data():
    run_adapters(*make_case(0, 4, 2, 8, 16))
    with torch.device("meta"):
        y, bank = torch.empty(5, 16), torch.empty(4, 8, 16)
        out = run_adapters(y, bank, bank, torch.empty(5, 2, dtype=torch.int64), torch.empty(5, 2))
    assert out.shape == (5, 16)
    assert tuning.export_choices() == []
