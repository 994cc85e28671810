"""PESC: a dense Hugging Face LLM in, a benchmarked sparse Mixture-of-Experts out.

Map
    pipeline.py   the stage table            recipe.py   one YAML file = one run       stage.py   what a stage is given and gives
    plan.py       what would run, and why    run.py      a whole recipe, without any server
    build.py      one action: opened or built                      cli.py      the `pesc` command
    store/        objects, actions, manifests, workspaces                provenance.py   where a result was made
    data/         download, dedup, mix, tokenize                         moe/, models/   the sparse layer, upcycle, merge
    train/        the rank program           launch/     processes that never outlive their parent
    evaluate/     lm-eval, sandbox, comparison, report                   routing/     how the experts are used
    heldout/      the loss on each held-out row                         study/       a recipe to its report, with what it took
    publish/      a model on the hub         serve/           a model behind an OpenAI-compatible server
    generate/     answers of a model         model_argument.py   the MODEL of a command     model_card.py   its README.md
    fit/          does a training fit, how long, at what price           devices.py   GPUs: memory, peak rates, prices
    mirror.py     many actions to and from the remote
    cost.py       what results took: hours, dollars, measured energy     reproduce.py   a stored result built again and compared
    bench/        measurements of speed and memory, each beside its control

Promises: importing `pesc`, planning, and the command line never import torch. Nothing here imports Prefect, `tasks` or `flows`.
"""

__version__ = "0.1.0"
