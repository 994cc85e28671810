"""The sparse layer: a router, a bank of adapters, and the ways to run them.

    y_TH   = FFN(x_TH)                                  one shared FFN
    z_TE   = x_TH · W_router^T                          the router reads the FFN INPUT
    w_TK   = softmax_fp32(top_k(z_TE))                  top-k first, softmax over the survivors
    out_TH = y_TH + s · Σ_K w · U_e · GELU(D_e · y_TH)  the adapters read the FFN OUTPUT; exact (erf) GELU; no bias

Map: config (the `pesc` block of config.json), router, adapters (the bank), dispatch (one interface for equal ways to compute the sum:
paths, segments; tuning measures which is fastest), balance (losses and statistics of the routing), layer (the mixin that widens a dense MLP).

Promises
- With the initial bank (`up` is zero) the layer returns the dense FFN's output, value for value.
- Every way of dispatch gives the same result up to rounding; `reference` is the oracle.
- The bank is one contiguous layout: `adapters.down [E,R,H]`, `adapters.up [E,R,H]`; `router.weight [E,H]`.

Never: imports anything of pesc outside this package, or `transformers`; draws a start value from a global random generator.

Pitfalls
- The bank is called `adapters`, not `experts`: vLLM's Transformers backend replaces modules of that name.
- Router and bank are plain modules with parameters, not `nn.Linear`: bitsandbytes must not quantise them, PEFT must not wrap them.
- top_k = 1 makes every gate weight exactly 1, so that the router learns from the balance loss alone.

This file imports no torch; `pesc.moe.config` can be read by programs that plan without it.
"""
