"""Measurements: what a claim about speed or memory stands on.

    pesc bench layer, pesc bench decode   the sparse layer against the dense FFN, the sparse model against the dense one
    pesc bench step                       a training step of PESC against the dense control's: ratio, memory, where the time goes
    pesc bench packing                    packed against padded training on the same rows: tokens a second, loss
    pesc bench convert                    dense to sparse conversion: time against a plain write of the same bytes, peak memory by model size

Key contracts
- A figure has its control in the same run, on the same machine and disk: what is reported first is a ratio.
- Memory is the peak of a process of its own.
- `--quick` measures the same with tiny shapes, in seconds: it shows that the measurement works, not what the figures are.

Nothing here imports torch before a command runs.
"""
