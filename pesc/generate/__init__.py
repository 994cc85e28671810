"""Using a model: `pesc generate` and `pesc chat`.

Map: prompts (the rows of a prompt file), speaker (a loaded model
and its tokenizer; one reply at a time), streaming (text as it is made, and the stop that Ctrl-C asks for), chat (the conversation on a terminal or
a pipe), commands (the command line).

Contract: generation is transformers' own `generate` with the model's own generation config; what an option does not set stays as it is there.

Never: runs code of a model directory unless `--trust-remote-code` is given.  Our own exports need no such trust, because their classes are here.

Pitfall: commands and prompts import no torch, so that a mistake is told before the seconds that torch takes.
"""
