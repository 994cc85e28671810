"""Training: LoRA (on a 4-bit base or not), the bank and the routers, or a Mixtral in full, with torchrun and DeepSpeed.

What it is
    stage.py        the builder: runs in the caller's process, never imports torch; starts the ranks, follows them, takes the result
    rank.py         the program that each rank runs (`python -m pesc.train.rank JOB.json` under torchrun)
    job.py          what stage and ranks tell each other: the job, the status, the errors
    blocks.py       packed blocks, memory-mapped      order.py       which block is read when
    collator.py     blocks -> one micro-batch         loss.py        cross-entropy over the supervised tokens
    modeling.py     model, LoRA, what is trainable    optimizer.py   optimizer and learning-rate schedule
    packed_rows.py  where rows begin, for attention   head.py        the output projection that gives the loss in chunks
    trainer.py      the step                          callbacks.py   dead gradients, the numbers of a step, history
    held_out.py     the loss on blocks never trained on              bad_loss.py    steps that cannot be right are not applied
    watch.py        events.jsonl and progress         flops.py       arithmetic of a step
    trackers.py     TensorBoard, W&B, MLflow          memory/        what a run needs, before it starts
    heartbeat.py    signs of life, and the watchdog   attempts.py    going on after a lost process or machine
    stop.py         a wish to stop, until the step ends
    deepspeed.py    ZeRO settings                     checkpoints.py complete checkpoints, and which ones can be continued
    result.py       the adapter, the bank, the record of the run

Promises
    Every token weighs the same, whatever the accumulation, the packing and the number of ranks.
    World size changes the order of floating-point sums only (and, with 8-bit optimizer states, where their blocks of 256 begin):
    a step reads the same blocks with the same dropout.
    A killed run continues from its last complete checkpoint and ends with the weights of a run that was never killed.
    Everything declared trainable is trained: a tensor that gets no gradient stops the run with its name.
    The bank exists once in memory, in the compute dtype, never quantised.
    Parts with learning rates of their own follow one schedule; parts of one rate are one optimizer group.
    Within a micro-batch the host never waits for the device (but where a kernel of torch's does, see pesc.moe.dispatch).

Never
    Loads CUDA in the caller's process.  Takes an incomplete checkpoint.  Trusts torchrun's exit code (it is 1 whether or not the
    work was saved): the ranks write `status.json`.

Pitfalls
    Rows packed into one block are isolated by their position ids, which start again at 0; an attention mask would switch that off.
    At the first step `up` and `lora_B` are zero, so the gradients of `down`, the router and `lora_A` are exactly zero, as they should be.
    Some tokenizers have pad == eos: labels, not token ids, say what is learned.
"""
