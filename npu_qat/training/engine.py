"""DeepSpeed under both training loops.

What this engine decides, and DeepSpeed does not:

* **Dtypes.** The base is 16 bits or 4, the adapters are fp32 and compute in 16 bits
  (``layers/lora.py``). DeepSpeed is told that it trains fp32, so that it casts nothing; the
  optimiser's parameters are the master weights, the same at every ZeRO stage.
* **Accumulation.** An update takes any number of micro-batches. The engine marks the last one; the
  loss of each is scaled by the caller so that their sum over micro-batches and ranks is the loss
  of the update; a factor of the world size undoes DeepSpeed's average over ranks.
* **Launch.** One plain process needs no launcher, no MPI, no port and no compiler: its group of one
  meets at a port that the system gives, and the CPU communication kernel that DeepSpeed would
  compile is left out (gloo does the work).

Gradients are checked for NaN and Inf as they are made; an update with such a gradient never
reaches the optimiser. With fp16 activations the loss is scaled for the backward pass and each
gradient scaled back as it arrives at its fp32 master weight.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from npu_qat.config import DeepSpeedSection, TrainConfig
from npu_qat.training.accelerators import (
    COLLECTIVES,
    check_accelerator,
    check_zero_overrides,
    gather_bytes,
    resolve_stage,
    zero_settings,
)
from npu_qat.training.network import name_interface, reach
from npu_qat.training.peers import stop_watching, watch_peers

# Keys of the DeepSpeed configuration that this program decides.
_RESERVED = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "amp",
    "torch_autocast",
}


# Seconds that rank 0 may start later than the others.
RENDEZVOUS_PATIENCE = 300.0
# Lifts gradients of 1e-8, which LoRA sees early on, into fp16's normal range.
FP16_LOSS_SCALE = 1024.0


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and the reason."""


def launch_environment(device: torch.device) -> None:
    """Join the process group, or make one of a single process. Call before any model; a second
    call does nothing.

    Raises ValueError if DeepSpeed was imported before and took another accelerator, or if the
    launcher's variables are incomplete.

    Respects the variables that torchrun and the deepspeed launcher set. Without them the process is
    alone, and the system gives its group a port while it is opened: one that was found free before
    may be another's by then, if many processes start at once.
    """
    os.environ["DS_ACCELERATOR"] = device.type  # the device was chosen, with a reason
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it later, too
    if torch.distributed.is_initialized():
        return
    _quiet()
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # DeepSpeed compiles a shared-memory collective at start-up: a minute, and an error on
        # machines without a compiler. The table is private; if it goes away, so has the reason.
        compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
        compatible["deepspeed_shm_comm"] = False
    check_accelerator(device.type)
    if device.type != "cpu":
        getattr(torch, device.type).set_device(int(os.environ["LOCAL_RANK"]))
    name_interface(device.type)
    backend = COLLECTIVES[device.type]
    if _is_launched():
        _meet()
    else:
        store = torch.distributed.TCPStore("127.0.0.1", port=0, world_size=1, is_master=True)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    watch_peers()
    atexit.register(_leave)


def _is_launched() -> bool:
    """Whether a launcher started this process; it may have started no other.

    Raises ValueError if the variables say that there are others, but not how to meet them: each of
    them would take itself for the only one, and write into the same folder.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in needed if name in os.environ}
    rank, count = given.get("RANK", "0"), given.get("WORLD_SIZE", "1")
    numbers = (rank, count, given.get("MASTER_PORT", "0"))
    sensible = all(text.isdecimal() for text in numbers) and int(rank) < int(count)
    missing = [name for name in needed if name not in given]
    if not sensible or (missing and count != "1"):
        told = ", ".join(f"{name} is {value!r}" for name, value in given.items())
        if missing:
            told += f", but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
        raise ValueError(
            f"{told}: start the processes with torchrun or the deepspeed launcher, or unset all "
            "four for a single one"
        )
    return not missing


def _meet() -> None:
    """Say on rank 0 for whom it waits. Elsewhere raise ``ValueError`` if rank 0's machine cannot
    be reached: the library's own attempt would take 10 minutes (DeepSpeed's ``DEEPSPEED_TIMEOUT``)
    and name a socket."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] != "0":
        if problem := reach(address, port, RENDEZVOUS_PATIENCE):
            raise ValueError(problem)
    elif (count := int(os.environ["WORLD_SIZE"])) > 1:
        print(f"waiting for all {count} processes at {address}:{port}", file=sys.stderr, flush=True)


def shut_down() -> None:
    """Leave the process group; a missing call can abort other ranks at exit.

    After a failure on any rank the group stays as it is: taking it down may wait for the lost one.
    A group of one stays until the process ends: DeepSpeed keeps references to it, and a program may
    carry out several runs.
    """
    if world()[1] > 1:
        _leave()


def _leave() -> None:
    if torch.distributed.is_initialized() and stop_watching():
        torch.distributed.destroy_process_group()


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Engine:
    """A model under DeepSpeed.

    Args:
        model: trainable parameters in fp32, everything else frozen.
        train: optimiser settings.
        section: ZeRO stage and extra DeepSpeed keys.
        fp16: activations are fp16, so that the loss needs a scale.

    Raises:
        ValueError: a reserved key in ``deepspeed.overrides``, one that the device cannot do, or no
            trainable parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        section: DeepSpeedSection,
        *,
        fp16: bool = False,
    ) -> None:
        import deepspeed

        self.loss_scale = train.loss_scale or (FP16_LOSS_SCALE if fp16 else 1.0)
        self.rank, self.world_size = world()
        self.device = next(model.parameters()).device
        self.zero_stage = resolve_stage(section.zero_stage, self.device.type, self.world_size)
        self.trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise ValueError("the model has no trainable parameter; add adapters first")
        wrong = [n for n, p in self.trainable.items() if p.dtype != torch.float32]
        assert not wrong, f"master weights must be fp32: {wrong[:3]}"
        if self.zero_stage == 3:
            gather_bytes(model, self.device)
        dtypes = {n: p.dtype for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(
            self.trainable.values(),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay,
        )
        self.ds, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_config(train, section, self.zero_stage, self.device.type),
            dist_init_required=False,
        )
        changed = [n for n, p in model.named_parameters() if p.dtype != dtypes[n]]
        if changed:
            raise TrainingError(
                f"DeepSpeed cast {changed[0]} to another dtype; this version of DeepSpeed is not "
                "supported (see constraints.txt for the tested one)"
            )
        self._bad_gradient: dict[str, torch.Tensor] = {}
        self._largest: dict[str, torch.Tensor] | None = {}
        # Largest |gradient| of each parameter in the first update that had any, times the number of
        # processes: the evidence of whether the straight-through estimator reaches every adapter.
        self.first_gradients: dict[str, float] = {}
        self._watch_gradients()
        self._make_adam_states()

    @property
    def model(self) -> nn.Module:
        """The module without DeepSpeed around it."""
        module: nn.Module = self.ds.module
        return module

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The AdamW under any ZeRO wrapper."""
        optimizer = self.ds.optimizer
        return optimizer.optimizer if self.zero_stage else optimizer

    # --- one update -------------------------------------------------------------------------

    def set_lr(self, lr: float) -> None:
        """Learning rate of the following updates."""
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``loss``; ``last`` marks the update's final micro-batch.

        DeepSpeed averages over ranks, so the gradient of the update is the mean over ranks of the
        sum of these losses: scale them by ``world_size``.
        """
        self.ds.set_gradient_accumulation_boundary(last)
        self.ds.backward(loss * self.loss_scale)

    def step(self) -> float:
        """Finish the update; returns the global gradient norm before clipping.

        Raises:
            TrainingError: a gradient is NaN or Inf, on any rank; the weights are unchanged. Or
                finite gradients have a norm that is not, by which clipping would make them zero.
        """
        self._refuse_bad_gradients()
        if self._largest is not None:
            largest = self._largest_gradients()
            # Advantages of groups with equal rewards are zero, and say nothing about the adapters.
            moved = max(largest.values(), default=0.0) > 0.0
            self.first_gradients, self._largest = (largest, None) if moved else ({}, {})
        if self.zero_stage == 0:
            norm = self._plain_grad_norm()
            _check_norm(norm)
            self.ds.step()
        else:
            self.ds.step()
            norm = float(self.ds.get_global_grad_norm())
            _check_norm(norm)
        return norm

    def _largest_gradients(self) -> dict[str, float]:
        """Largest |gradient| of each parameter in this update, over all ranks."""
        names, zero = sorted(self.trainable), torch.zeros((), device=self.device)
        values = torch.stack([(self._largest or {}).get(name, zero) for name in names])
        if self.world_size > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return dict(zip(names, values.tolist(), strict=True))

    def keep_first_gradients(self, found: dict[str, float]) -> None:
        """Go on with the evidence of an earlier part of the run, if it had an update."""
        if found:
            self.first_gradients, self._largest = found, None

    def between_micro_batches(self) -> None:
        """Tell DeepSpeed that a micro-batch is done that is not the last."""
        self.ds.step()

    def _plain_grad_norm(self) -> float:
        grads = [p.grad for p in self.trainable.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _watch_gradients(self) -> None:
        for name, parameter in self.trainable.items():
            parameter.register_hook(self._check_gradient(name))

    def _check_gradient(self, name: str) -> Any:
        def hook(grad: torch.Tensor) -> torch.Tensor:
            bad = ~torch.isfinite(grad).all()
            seen = self._bad_gradient.get(name)
            self._bad_gradient[name] = bad if seen is None else seen | bad
            if self._largest is not None:
                largest = grad.detach().abs().amax() / self.loss_scale
                before = self._largest.get(name)
                self._largest[name] = largest if before is None else before.maximum(largest)
            return grad if self.loss_scale == 1.0 else grad / self.loss_scale

        return hook

    def _refuse_bad_gradients(self) -> None:
        names, flags = list(self._bad_gradient), list(self._bad_gradient.values())
        self._bad_gradient = {}
        mine = [n for n, bad in zip(names, torch.stack(flags).tolist(), strict=True) if bad]
        if self.sum(float(bool(mine))) > 0:
            where = mine[0] if mine else "a parameter on another rank"
            cure = "lower train.lr"
            if self.loss_scale != 1.0:
                cure += f" or train.loss_scale ({self.loss_scale:g})"
            raise TrainingError(
                f"the gradient of {where} is NaN or Inf; no update was made; {cure} and resume"
            )

    # --- generation -------------------------------------------------------------------------

    @contextmanager
    def for_generation(self) -> Iterator[nn.Module]:
        """The plain module, whole on every rank, in evaluation mode.

        At ZeRO stage 3 the partitioned parameters are gathered once for the whole rollout, and
        DeepSpeed's per-module hooks, which would fetch and free them again for each token, are
        taken off meanwhile. So are, at every stage, the two that it puts on the whole model to time
        its own forward pass: a model with hooks cannot be recorded as a CUDA graph (decode.py).
        """
        with self.evaluation_mode(), self.gathered(), self._root_hooks_off():
            yield self.model

    @contextmanager
    def _root_hooks_off(self) -> Iterator[None]:
        self.ds.module_forward_pre_hook.remove()
        self.ds.module_forward_post_hook.remove()
        try:
            yield
        finally:
            self.ds.module_forward_pre_hook = self.ds._create_module_forward_pre_hook()
            self.ds.module_forward_post_hook = self.ds._create_module_forward_post_hook()

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """No dropout inside the block."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Every parameter whole on every rank. Nothing to do below ZeRO stage 3."""
        if self.zero_stage < 3:
            yield
            return
        import deepspeed

        offload = self.ds.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            for parameter in self.model.parameters():
                parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
            offload._remove_module_hooks()
            try:
                yield
            finally:
                if not offload.param_coordinator.is_invalid_trace():  # as before the first pass
                    offload.param_coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)

    # --- state ------------------------------------------------------------------------------

    def _make_adam_states(self) -> None:
        """Adam makes its states in its first step; a checkpoint may be written or read before."""
        zero = self.ds.optimizer
        if self.zero_stage == 3:  # hands Adam one partition at a time
            parameters = list(zero.fp32_partitioned_groups_flat)
        else:
            parameters = [p for group in self.base_optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            self.base_optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        if self.zero_stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()

    def set_adam_step(self, step: int) -> None:
        """Number of updates that Adam's bias correction counts."""
        for state in self.base_optimizer.state.values():
            if isinstance(state, dict) and "step" in state:
                if isinstance(state["step"], torch.Tensor):
                    state["step"].fill_(float(step))
                else:
                    state["step"] = step

    def state(self) -> dict[str, torch.Tensor]:
        """Master weights and Adam's moments, whole, on the CPU of every rank.

        Keys ``<parameter>``, ``<parameter>/exp_avg``, ``<parameter>/exp_avg_sq``. Independent of
        ZeRO stage and number of processes.
        """
        return {
            key: value.detach().float().cpu().clone()
            for name, parameter in self.trainable.items()
            for key, value in self._full_state(name, parameter).items()
        }

    def _full_state(self, name: str, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        if self.zero_stage == 0:
            moments = self.base_optimizer.state[parameter]
            return {
                name: parameter,
                f"{name}/exp_avg": moments["exp_avg"],
                f"{name}/exp_avg_sq": moments["exp_avg_sq"],
            }
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return {
            name: safe_get_full_fp32_param(parameter),
            f"{name}/exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg"),
            f"{name}/exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        }

    def load_state(self, state: dict[str, torch.Tensor], adam_step: int) -> None:
        """The inverse of ``state``.

        Raises:
            ValueError: the checkpoint's parameters are not this model's.
        """
        expected = {
            key
            for name in self.trainable
            for key in (name, f"{name}/exp_avg", f"{name}/exp_avg_sq")
        }
        if difference := sorted(expected ^ set(state)):
            raise ValueError(
                f"the checkpoint does not fit this model: {len(difference)} differing entries, "
                f"the first is {difference[0]}. Resume with the lora section it was trained with"
            )
        for name, parameter in self.trainable.items():
            moments = {k: state[f"{name}/{k}"] for k in ("exp_avg", "exp_avg_sq")}
            # copy_() would broadcast, e.g. rank 1 into any rank.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if any(value.shape != shape for value in (state[name], *moments.values())):
                raise ValueError(
                    f"the checkpoint does not fit this model: {name} has the shape "
                    f"{tuple(state[name].shape)} there and {tuple(shape)} here"
                )
            if self.zero_stage == 0:
                parameter.data.copy_(state[name])
                for key, moment in moments.items():
                    self.base_optimizer.state[parameter][key].copy_(moment)
            else:
                self._load_partitioned(parameter, state[name], moments)
        self.set_adam_step(adam_step)

    def _load_partitioned(
        self, parameter: nn.Parameter, value: torch.Tensor, moments: dict[str, torch.Tensor]
    ) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(parameter, value.to(self.device))
        for key, moment in moments.items():
            safe_set_full_optimizer_state(parameter, moment.to(self.device), key)
        gathered = [parameter] if self.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0):
            parameter.data.copy_(value)

    # --- talking to the other ranks ---------------------------------------------------------

    def sum(self, value: float) -> float:
        """The sum of ``value`` over ranks, in fp64."""
        return sum(self._values_of_all(value))

    def max(self, value: float) -> float:
        """The largest ``value`` over ranks."""
        return max(self._values_of_all(value))

    def _values_of_all(self, value: float) -> list[float]:
        """``value`` of every rank, exact.

        Gathered as the bits of an int64 and added up here: fp32 would lose counts above 2^24, and
        HCCL reduces no fp64.
        """
        if self.world_size == 1:
            return [value]
        bits = torch.tensor([value], dtype=torch.float64).view(torch.int64).to(self.device)
        everyone = bits.new_empty(self.world_size)
        torch.distributed.all_gather_into_tensor(everyone, bits)
        values: list[float] = everyone.cpu().view(torch.float64).tolist()
        return values

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """The lists of all ranks, joined in the order of ranks, on every rank."""
        if self.world_size == 1:
            return mine
        lists: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(lists, mine)
        return [item for part in lists for item in part]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()


def _check_norm(norm: float) -> None:
    if not math.isfinite(norm):
        raise TrainingError(
            f"the norm of the gradient is {norm}; lower train.lr and resume from the last "
            "checkpoint, which is intact"
        )


def _config(
    train: TrainConfig, section: DeepSpeedSection, stage: int, device: str
) -> dict[str, Any]:
    if reserved := sorted(_RESERVED & set(section.overrides)):
        raise ValueError(
            f"deepspeed.overrides: {reserved[0]!r} is decided by this program; see the train "
            "section for batch sizes, clipping and the optimiser"
        )
    overrides = dict(section.overrides)
    asked = overrides.pop("zero_optimization", {})
    check_zero_overrides(asked, device)
    zero = zero_settings(stage, device) | asked
    if zero["stage"] != stage:
        raise ValueError("set the ZeRO stage by deepspeed.zero_stage, not by overrides")
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        **overrides,
    }


def _quiet() -> None:
    """Silence start-up chatter that no user can act on; errors still show."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
