"""What routing_program.py runs inside vLLM's worker; a module of its own, so that the worker can import it by name."""


def install(model):
    for module in model.modules():
        if type(module).__name__ == "Router":
            module.seen = []
            module.register_forward_hook(lambda router, _arguments, out: router.seen.append(router.select(out)[0][0].tolist()))


def collect(model):
    found = []
    for module in model.modules():
        if type(module).__name__ == "Router":
            found.append(module.seen[0])
            module.seen.clear()
    return found
