"""`pesc fit`: whether a recipe's training fits given GPUs, with which settings, how long it takes and what it costs, before anything runs.

What it is
    planner.py   a recipe's arms on a device            speed.py    tokens/s, hours and cost
    table.py     what is printed                        commands.py the command

The bytes of weights, gradients and optimizer states are exact (`pesc.train.memory`); activations are an estimate by formula; speed is a range
of shares of the device's peak rate, an assumption that `--tokens-per-second` replaces by a measurement.

Never
    Imports torch, or asks the network.
"""
