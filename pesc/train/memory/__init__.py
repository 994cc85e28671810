"""What a training run needs of each GPU, known before it starts and without a tensor.

What it is
    shapes.py       a model's projections, norms and embeddings, from its config.json or from a table of known bases
    trained.py      what is trained, tensor by tensor
    states.py       weights, gradients, masters and optimizer states of one rank, also under ZeRO

Promises
    The numbers are the bytes of the tensors that the run makes, equal and not about.
    Nothing here imports torch, or reads a weight.

Pitfalls
    bf16 with ZeRO-1 runs DeepSpeed's BF16_Optimizer: its fp32 gradients are whole on every rank, and only masters and states are sharded.
    Activations, logits, communication buckets and the CUDA context are not counted here.
"""
