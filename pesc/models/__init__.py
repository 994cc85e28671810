"""Models: dense architectures and their sparse twins, and the stages that convert and merge them.

    import pesc.models
    pesc.models.register()
    model = AutoModelForCausalLM.from_pretrained(sparse_directory)

Map
    factory.py, mixtral.py         the sparse twin of any transformers decoder that has an `mlp` in its layers; whole experts
    upcycle.py                     dense directory -> sparse directory        placement.py   the device, and whether one GPU holds a model
    published.py, training_checkpoint.py, export_published.py                 other people's PESC checkpoints, read and written
    export.py                      a directory that loads without this package
    merge.py                       the merge stage: what is merged, and what is refused          lora.py   an adapter, checked
    merge_write.py, merge_tensor.py, merge_nf4.py                             its files, tensor by tensor, and in 4 bit
    merge_whole.py                 the same for a model that was trained in full
    proof.py, nf4_proof.py, trained_reference.py, streamed.py                 merged against unmerged, a module in memory at a time
    nf4.py, nf4_files.py           4-bit weights, computed and stored         identity.py    what a model is, in one digest
    tensor_files.py, pickle_files.py, new_directory.py                        files read and written piece by piece; whole or not at all
    commands.py                    upcycle, import, export                    config.py      the stages' settings

Promises
- A sparse model is the dense model's own class with a wider MLP: dense weights keep their names, and any dense checkpoint loads.
- No conversion holds more than one tensor in memory beside what it must (one shard where a pickle is written).
- A merge that loses, adds or transposes a tensor is refused, not written.

Never: executes code or pickles of a checkpoint (weights_only), puts `num_experts` at the top level of config.json.

Pitfall: importing this package registers nothing, because `pesc.models.config` must import without torch.  Call `register()`.
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
"""On CPUs with AVX-512-bf16 it warns, once a process, that it did not get a faster kernel from the hub."""


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` know every sparse architecture.  Idempotent.

    Types beyond the main ones (`pesc.models.factory.MAIN_TYPES`) are made when a config of theirs is read.
    """
    from pesc.models.factory import register_architectures

    register_architectures()
