"""A model on the Hugging Face hub: `pesc publish MODEL --repo ORG/NAME`.

Map: contents (which files of a directory belong to a model, and whether they are whole), card (the licence fields of README.md),
repository (the hub: what is there, sending, one commit, looking again), commands (the command line).

Promises
- Nothing is sent before the directory is whole: every shard by its header and length, the card by its licence, the code by its names.
- Only files of the model go out; what stays here is named with the reason.
- One commit or none: a run that is cut off leaves the repository as it was, and the next one sends only what is missing.
- It counts as published when the hub lists the digest of every file as it is here.

Never: takes a token as an argument or prints one, imports torch for a directory, sends a pickle.
"""
