"""One rank of two that hold a model by transformers' own tensor parallelism.

torchrun --nproc-per-node 2 -m tests.models.tensor_parallel_program MODEL_DIR TRUST OUT
"""

import sys

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import pesc.models
from tests.models.builders import tokens

directory, trust, out = sys.argv[1:]
if trust == "no":
    pesc.models.register()
torch.distributed.init_process_group("gloo")
config = DistributedConfig(tp_size=2, tp_plan="auto")
model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=config, dtype=torch.float32, trust_remote_code=trust == "yes")
with torch.no_grad():
    logits = model(tokens()).logits
whole = {name: tuple(getattr(tensor, "_local_tensor", tensor).shape) for name, tensor in model.state_dict().items()}
if torch.distributed.get_rank() == 0:
    torch.save({"logits": logits, "shapes": whole, "plan": model.tp_plan, "module": type(model).__module__}, out)
torch.distributed.destroy_process_group()
