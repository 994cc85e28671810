"""Processes that never outlive whoever started them.

What it is
    guard.py      a program that ties the command it becomes to the life of its parent
    supervise.py  start a command, read its output, stop the whole tree whatever happens
    events.py     one JSON event a line, on the same stdout as everybody else's noise
    torchrun.py   the command line that starts the ranks
    network.py    this machine's address, interface and role among several
    hostfile.py   one command on every machine of a hostfile; commands.py is `pesc launch`
    isolated.py   run a stage's builder in a process of its own
    one_job.py    build one action of a store in a process of its own; side_by_side.py builds several at once
    energy.py     joules of the GPUs, from the driver's counters
    pool.py       worker processes for the shards of a stage
    relay.py      shards of an isolated builder, done by whoever started it

Promises
    No process is left behind: not after an exception, Ctrl-C, SIGTERM, or SIGKILL of the caller.
    An event is never confused with other output, and other output is never lost: it is in the log file.
    An error that the user can mend arrives in the caller with the class and the sentence it was raised with.

Never
    Imports torch.  Swallows an exception (Prefect's termination signal is one).  Trusts an exit code for "was the work saved".

Pitfalls
    The parent-death signal fires when the *thread* that started the child ends: call `supervise.run` from the main thread.
    torchrun gives each rank a session of its own, so a signal to torchrun's group does not reach the ranks: each rank sets its
    own death signal (`guard.die_with_parent`) and leaves its pid (`supervise.record_pid`).
"""
