"""What a training run needs of each GPU, known before it starts and without a tensor.

What it is
    shapes.py       a model's projections, norms and embeddings, from its config.json or from a table of known bases
    trained.py      what is trained, tensor by tensor
    states.py       weights, gradients, masters and optimizer states of one rank, also under ZeRO
    activations.py  what a micro-batch keeps for its backward pass, by formula
    need.py         all of it together; the largest micro-batch, and the layouts that fit
    check.py        `train` refuses what cannot fit

Promises
    The bytes of weights, gradients, masters and optimizer states are those of the tensors that the run makes, equal and not about.
    Activations are an estimate, within a tenth of what autograd saves.
    Nothing here imports torch, or reads a weight.

Pitfalls
    bf16 with ZeRO-1 runs DeepSpeed's BF16_Optimizer: its fp32 gradients are whole on every rank beside the bf16 ones, and only masters and
    states are sharded.
    ZeRO-3 shards what every rank has loaded whole: loading can be the peak.
    Two numbers are not tensors but allowances: CUDA's context, and NCCL's channels.
    fp32 with ZeRO-2: a rank may hold a tensor whole that its part of the gradients ends in, up to that tensor's size more.
"""
