"""Models: dense architectures and their sparse twins, and the stages that convert and merge them.

    import pesc.models
    pesc.models.register()
    model = AutoModelForCausalLM.from_pretrained(sparse_directory)

Map: factory (the sparse twin of any transformers decoder that has an `mlp` in its layers, registered with the Auto classes), upcycle (dense
directory -> sparse directory), merge (LoRA folded into the weights, with ledger and proof), published and training_checkpoint (other
people's PESC checkpoints, read), export_published (written), export (a directory that loads without this package), commands (the command line
of all these), new_directory (whole or not at all), tensor_files and pickle_files (read and written piece by piece), config (the stages' settings).

Promises
- A sparse model is the dense model's own class with a wider MLP: dense weights keep their names, and any dense checkpoint loads.
- No conversion holds more than one tensor in memory beside what it must (one shard where a pickle is written).
- A merge that loses, adds or transposes a tensor is refused, not written.

Never: executes code or pickles of a checkpoint (weights_only), puts `num_experts` at the top level of config.json.

Pitfall: importing this package registers nothing, because `pesc.models.config` must import without torch.  Call `register()`.
"""


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` know every sparse architecture.  Idempotent.

    Types beyond the main ones (`pesc.models.factory.MAIN_TYPES`) are made when a config of theirs is read.
    """
    from pesc.models.factory import register_architectures

    register_architectures()
