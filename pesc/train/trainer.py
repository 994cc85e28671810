"""The training step: transformers' Trainer with packed data, a loss weighed by tokens, and load balancing.

B blocks of a micro-batch, S positions, N supervised tokens, V vocabulary, L sparse layers, E experts, T tokens that count, M micro-batches
of a step over all ranks.

    loss = Σ_tokens CE / (supervised tokens of the whole step)
         + α · (1/M) Σ_micro-batches Σ_layers E · Σ_i f_i · P_i              balance.kind switch
         + β · (1/M) Σ_micro-batches Σ_layers mean_T (log Σ_e exp z_e)²      z-loss
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from typing import Any

import torch
from peft import PeftModel
from torch import distributed
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from pesc.models import mixtral
from pesc.moe.balance import RouterRecorder
from pesc.moe.tuning import export_choices
from pesc.train import checkpoints
from pesc.train.bad_loss import StepGate, decide, find_fault, finite, keep_norm
from pesc.train.callbacks import GradientWatch, History, Routing, StepTotals, Throughput
from pesc.train.collator import Collator, OrderedBlocks, loading
from pesc.train.head import LossHead, batch_cross_entropy
from pesc.train.heartbeat import Heartbeat
from pesc.train.held_out import HeldOut
from pesc.train.job import Job
from pesc.train.modeling import trainable_parameters
from pesc.train.optimizer import learning_rate_at, make_optimizer, make_schedule, part_of, rates_at
from pesc.train.order import RankBatches, derive_seed
from pesc.train.stop import StopRequest
from pesc.train.watch import RunWatch

logger = logging.getLogger(__name__)


class PescTrainer(Trainer):
    """One rank's trainer.  `interrupted` says why the run ended early, if it did."""

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        args: TrainingArguments,
        data: OrderedBlocks,
        job: Job,
        stop: StopRequest,
        heartbeat: Heartbeat,
        events: RunWatch,
        held_out: HeldOut | None = None,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=data, callbacks=[_EndOfStep(self)])
        self.job, self.stop, self.heartbeat, self.events, self._held_out = job, stop, heartbeat, events, held_out
        self._data, self._trained = data, model
        self.history, self.throughput = History(), Throughput()
        self.interrupted: str | None = None
        config = model.config
        self._recorder = _record_routers(model, job.config.method)
        routers = list(self._recorder.routers.values()) if self._recorder else []
        self._totals = StepTotals(args.device, [router.num_experts for router in routers])
        self._watch = GradientWatch(model, job.steps, args.device, job.execution.gradient_check_steps, tells=args.process_index == 0)
        self._parts = sorted({part_of(name) for name, _ in trainable_parameters(model)})
        self._flatten = config._attn_implementation == "flash_attention_2"
        base: Any = _inside_peft(model)
        self._can_choose_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._head = LossHead.of(base)
        self._taken: dict[str, Any] = {}
        self._choices: list[torch.Tensor] = []
        self._gate = StepGate(self._judge)

    # ---- data

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """This rank's micro-batches, in order."""
        config = self.job.config
        batches = RankBatches(
            self.job.steps, config.global_batch_size, config.micro_batch_size, self.args.process_index, self.args.world_size
        )
        collator = Collator(flatten=self._flatten, choose_logits=self._can_choose_logits)
        settings = loading(self.args.device.type, batches.accumulation)
        return torch.utils.data.DataLoader(self._data, batch_sampler=batches, collate_fn=collator, **settings)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, torch.Tensor]:
        """A step's micro-batches, and the supervised tokens in those of all ranks."""
        self._gate.open_step()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        supervised = torch.full((), sum(batch["supervised"] for batch in batches), dtype=torch.long, device=device)
        self._reduce(supervised, distributed.ReduceOp.SUM)
        return batches, supervised

    # ---- the step

    def training_step(self, model: torch.nn.Module, inputs: dict, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        """Forward and backward of one micro-batch, with its own dropout whoever computes it."""
        model.train()
        self.heartbeat.beat(f"training step {self.state.global_step + 1}")
        position = inputs["position"]
        inputs = self._prepare_inputs(inputs)
        torch.manual_seed(derive_seed("dropout", self.job.config.seed, position))
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss, scale_wrt_gas=False)
        return loss.detach()

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Tensors on the device, without waiting for the copy; numbers stay on the host."""
        device = self.args.device
        return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """This micro-batch's share of the step's loss, times the number of ranks (DeepSpeed averages over them)."""
        world = self.args.world_size
        share = world / num_items_in_batch.clamp(min=1).float()
        if self._recorder is None:
            loss = self._cross_entropy(model, inputs, share)
            self._totals.add(loss / world, inputs["tokens"], None)
            return loss
        with self._recorder:
            loss = self._cross_entropy(model, inputs, share)
        routing = self._routing(inputs["valid"])
        self._totals.add(loss / world, inputs["tokens"], Routing(routing.balance / world, routing.z / world, routing.choices))
        self._recorder.clear()
        balance = self.job.config.balance
        if balance.kind == "switch":
            loss = loss + balance.coefficient * routing.balance
        return loss + balance.z_coefficient * routing.z if balance.z_coefficient else loss

    def _cross_entropy(self, model: torch.nn.Module, inputs: dict, share: torch.Tensor) -> torch.Tensor:
        return batch_cross_entropy(model, self._head, inputs, share, self._can_choose_logits)

    def _routing(self, valid_BS: torch.Tensor) -> Routing:
        """This micro-batch's shares of the mean balance and z-losses (times the ranks), and its choices."""
        assert self._recorder is not None
        parts = self.args.gradient_accumulation_steps
        with torch.set_grad_enabled(self.job.config.balance.kind == "switch"):
            balance = self._recorder.balance_loss(valid_BS) / parts
        with torch.set_grad_enabled(self.job.config.balance.z_coefficient > 0):
            z = self._recorder.z_loss(valid_BS) / parts
        return Routing(balance, z, list(self._recorder.choices(valid_BS).values()))

    # ---- optimizer

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """One group of everything that is trained with one learning rate."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.job.config, trainable_parameters(self._trained), self.args.device.type)
            self._gate.guard(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """`learning_rate_at` of every step."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(self.job.config, optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- the end of a step

    def end_step(self, control: Any) -> None:
        """Agree on the step's numbers and on whether to stop.  Raises TrainingFailedError on all ranks together."""
        step = self.state.global_step
        if fault := self._gate.verdict():
            self._leave_out(step, fault)
        elif self._recorder is not None and self.job.config.balance.kind == "bias":
            for router, choices_E in zip(self._recorder.routers.values(), self._choices, strict=True):
                router.update_bias(choices_E)
        self._watch.end_step(lambda tensor: self._reduce(tensor, distributed.ReduceOp.MAX))
        self.throughput.end_step(self._taken["tokens"])
        code = torch.tensor(self.stop.code, device=self.args.device)
        self._reduce(code, distributed.ReduceOp.MAX)
        if code.item() and step < self.job.steps:
            self.interrupted = self.stop.reason(code.item())
            control.should_save = control.should_training_stop = True
        control.should_evaluate = not self.interrupted  # the run that continues looks first: there may be no time now

    def _judge(self) -> str:
        """What is wrong with the step, before the optimizer moves: the sums over all ranks, and the norm of the gradient."""
        self._taken, self._choices = self._totals.take(lambda tensor: self._reduce(tensor, distributed.ReduceOp.SUM))
        norm = self._engine.optimizer._global_grad_norm
        return find_fault(self.job.config.bad_loss, self._taken["loss"], self._taken.get("balance", 0.0), float(norm), self.history.lines)

    @property
    def _engine(self) -> Any:
        """DeepSpeed's engine, there once training has begun."""
        return self.model_wrapped

    def begin(self) -> None:
        """Called when the engine is there and no step was made."""
        keep_norm(self._engine)
        self.stop.defer()
        self.look()

    def _leave_out(self, step: int, fault: str) -> None:
        """Note a step that was not applied.  The schedule goes on, so that the learning rate stays a function of the step."""
        config = self.job.config
        logger.warning("%s", decide(config.bad_loss, fault, step, self.history.lines, self.job.address, config.learning_rate))
        if getattr(self._engine.optimizer, "overflow", False):  # DeepSpeed saw it as well, and held the schedule back
            getattr(self.lr_scheduler, "scheduler", self.lr_scheduler).step()
        self._taken = {name: finite(value) for name, value in self._taken.items()} | {"skipped": fault}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The history's line of a step; Trainer's own summaries are dropped."""
        if "grad_norm" not in logs or not self._taken:
            return
        step = self.state.global_step
        rates = rates_at(self.job.config, step - 1, self.job.steps, self._parts)
        line = {
            "step": step,
            "lr": learning_rate_at(self.job.config, step - 1, self.job.steps),
            **({"lr_by_part": rates} if len(set(rates.values())) > 1 else {}),
            "grad_norm": finite(float(logs["grad_norm"])),
            **self._taken,
        }
        self._taken = {}
        self.history.lines.append(line)
        self.events.step(line, self.throughput.tokens_per_second)

    # ---- the held-out loss

    def look(self) -> None:
        """Measure the held-out loss if it is due and not known yet; all ranks together."""
        step, held_out = self.state.global_step, self._held_out
        if held_out is None or not held_out.is_due(step) or self.history.has_looked(step):
            return
        started = time.monotonic()
        measured = held_out.measure(self._sum_of_losses, lambda tensor: self._reduce(tensor, distributed.ReduceOp.SUM), self.args.device)
        seconds = time.monotonic() - started
        self.throughput.leave_out(seconds)
        self.history.held_out.append({"step": step, **measured})
        self.events.evaluated(step, measured, seconds)

    def _sum_of_losses(self, items: Any) -> torch.Tensor:
        """Σ cross-entropy of some blocks, without dropout; `training_step` goes back to training mode."""
        model: Any = self.model_wrapped
        model.eval()
        self.heartbeat.beat(f"the held-out loss after step {self.state.global_step}")
        inputs = self._prepare_inputs(Collator(flatten=self._flatten, choose_logits=self._can_choose_logits)(items))
        with torch.no_grad():
            return self._cross_entropy(model, inputs, torch.ones((), device=self.args.device)).detach()

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Trainer's place for it: after the step's line, before its checkpoint."""
        self.look()
        return {}

    def _reduce(self, tensor: torch.Tensor, operation: Any) -> None:
        if self.args.world_size > 1:
            distributed.all_reduce(tensor, op=operation)

    # ---- checkpoints

    @property
    def layout(self) -> checkpoints.Layout:
        """What the optimizer's shards depend on."""
        return checkpoints.Layout(self.args.world_size, self.job.execution.zero_stage)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Everything first, on all ranks; then the marker; then older ones go.  Raises CheckpointSpaceError."""
        started, step, root = time.monotonic(), self.state.global_step, self.job.checkpoints
        self.heartbeat.beat(f"saving the checkpoint at step {step}")
        path = checkpoints.checkpoint_path(root, step)
        with checkpoints.room_needed(root, step, self.job.address):
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self.history.save(path)
            checkpoints.save_dispatch(path, self.args.process_index, export_choices())
        if self.args.world_size > 1:
            distributed.barrier()
        if self.args.should_save:
            with checkpoints.room_needed(root, step, self.job.address):
                checkpoints.name_latest(path)
                checkpoints.mark_complete(path, self.layout)
        if self.args.world_size > 1:
            distributed.barrier()  # no machine removes what another still needs
        if self.args.should_save:
            checkpoints.clean(root, self.job.execution.keep_checkpoints)
        seconds = time.monotonic() - started
        self.throughput.leave_out(seconds)
        self.events.saved(step, seconds)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: DeepSpeed's part of the checkpoint holds all trained weights, and the base never changes."""
        os.makedirs(output_dir or self.job.checkpoints, exist_ok=True)

    def floating_point_ops(self, inputs: dict) -> int:
        """Not counted."""
        return 0


def _record_routers(model: torch.nn.Module, method: str) -> RouterRecorder | None:
    """The recorder of a sparse model, this package's or a Mixtral; None for a dense one."""
    if method == "upcycle-full":
        return RouterRecorder(model, mixtral.find_routers(model))
    return RouterRecorder(model) if method == "pesc" else None


def _inside_peft(model: PeftModel | PreTrainedModel) -> torch.nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


class _EndOfStep(TrainerCallback):
    """Calls the trainer back; installed before Trainer's own callbacks have the last word on saving."""

    def __init__(self, trainer: PescTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.end_step(control)
