"""What a terminal and a plain log show of a training."""

from __future__ import annotations

import io

from rich.console import Console

from pesc.console import ConsoleRun, live_details
from pesc.progress_text import experts_text, fields_text
from pesc.stage import Progress

FIELDS = {
    "loss": 1.9321, "balance": 1.011, "lr": 2e-4, "grad_norm": 0.31, "tokens_per_second": 12340.4, "mfu": 0.412, "expert_max": 0.31,
    "expert_min": 0.04, "expert_entropy": 0.971, "held_out": 1.901, "held_out/code": 1.4123, "held_out/[maths]": 2.014,
}  # fmt: skip


def test_numbers_have_units_and_the_held_out_losses_their_domains():
    assert fields_text(FIELDS) == (
        "loss 1.932  balance 1.011  grad norm 0.31  lr 2.0e-04  12,340 tokens/s  MFU 41 %  held-out 1.901 (code 1.412, [maths] 2.014)  "
        "experts 4 % – 31 %, entropy 0.97"
    )
    assert fields_text({"rows": 12.0}) == "rows 12"
    assert fields_text({}) == ""


def test_the_bar_of_the_experts_spans_the_idlest_to_the_busiest():
    assert (
        experts_text({"expert_min": 0.1, "expert_max": 0.5, "expert_entropy": 1}, width=10)
        == "experts [·████·····] 10 % – 50 %, entropy 1.00"
    )
    assert "█" in experts_text({"expert_min": 0.25, "expert_max": 0.25}, width=10)


def test_a_terminal_gets_lines_below_the_bar_only_where_there_is_something_to_show():
    assert live_details(Progress(1, 2)) is None
    run = ConsoleRun(console=Console(file=io.StringIO(), force_terminal=True, width=120))
    run._progress(Progress(40, 200, message="training", fields=FIELDS))
    with run._bar.console.capture() as shown:
        run._bar.console.print(*run._bar.get_renderables())
    assert "held-out 1.901 (code 1.412, [maths] 2.014)" in shown.get()
    assert "12,340 tokens/s" in shown.get()


def test_a_plain_log_gets_a_line_now_and_then():
    out = io.StringIO()
    run = ConsoleRun(console=Console(file=out, force_terminal=False, width=400))
    for step in range(500):
        run._progress(Progress(step, 500, message="training", fields=FIELDS))
    assert out.getvalue().count("\n") == 1
    assert "0/500 steps  training  loss 1.932" in out.getvalue()
