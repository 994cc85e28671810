"""Measurements that a user can repeat: `pesc bench layer`, `pesc bench decode`, `pesc bench convert`.

Promises: whatever is compared is measured in turn in one run, against a control (the dense layer, the dense model, a plain write of as many bytes);
each table names the machine, versions and command.  The bars are asserted in tests/benchmarks.

Never: imports anything of pesc but the code that is measured.  This file imports no torch.
"""
