"""Who samples the completions of a rollout: the modules that are trained, or a serving engine.

Both answer the same question, so the DAPO loop does not know which one it has:

    sampler.follow(model)               # compute what ``model`` computes now
    sampler.sample(prompts, keys, ...)  # completions with the log-probability of each token

``ModuleSampler`` (``rollout.engine: hf``) decodes with the very modules that are trained: nothing
to synchronise, nothing to prove. ``VllmSampler`` (``rollout_vllm.py``) is another program with its
own copy of the base, so it must be told the adapter and the norms each time, and it has to prove
that it computes the same model before it may sample anything that is trained on (``gate``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from torch import nn

from npu_qat.training.engine import TrainingError
from npu_qat.training.rollout import Completion, SamplingParams, sample

# How every refusal of an engine that computes another model begins.
OTHER_MODEL = "rollout.engine {} does not compute the model that is trained"


class Sampler(Protocol):
    """Draws completions."""

    name: str
    # Whether rollouts pass through the trained modules, where the audit sees them.
    in_modules: bool
    # Whether it is known to compute the model that is trained.
    proven: bool

    def follow(self, model: nn.Module) -> None:
        """Compute what ``model`` (whole, its noise in place) computes now.

        Raises ``TrainingError`` if the sampler cannot.
        """
        ...

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        params: SamplingParams,
        *,
        stop: Callable[[], None],
    ) -> list[Completion]:
        """One completion for each of ``prompts``; ``keys`` are their random streams.

        Raises ``TrainingError`` if NaN or Inf is met.
        """
        ...


class ModuleSampler:
    """Decodes with the modules that are trained.

    Args:
        eos_ids: tokens that end a completion.
        pad_id: any valid token.
        batch_size: rows decoded together.
    """

    name = "hf"
    in_modules = True
    proven = True

    def __init__(self, eos_ids: Sequence[int], pad_id: int, batch_size: int) -> None:
        self.eos_ids, self.pad_id, self.batch_size = list(eos_ids), pad_id, batch_size
        self.model: Any = None

    def follow(self, model: nn.Module) -> None:
        self.model = model

    def sample(
        self,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        params: SamplingParams,
        *,
        stop: Callable[[], None],
    ) -> list[Completion]:
        return sample(
            self.model,
            prompts,
            keys,
            params,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            batch_size=self.batch_size,
            stop=stop,
        )


@dataclass(frozen=True)
class Gate:
    """How far a sampler's log-probabilities are from the trained modules', noise off.

    Attributes:
        gaps: |difference| a token to the modules as they are trained.
        dropped: the same to the modules with inputs in 16 bits, which is what a server computes
            that drops the quantisation of activations; empty where training has none.
    """

    gaps: Sequence[float]
    dropped: Sequence[float]

    def metrics(self) -> dict[str, float]:
        """For the step's record."""
        found = {"engine_gap_mean": fmean(self.gaps), "engine_gap_max": max(self.gaps)}
        if self.dropped:
            found["engine_gap_16bit_inputs_mean"] = fmean(self.dropped)
        return found

    def check(self, name: str, limit: float) -> None:
        """Raise ``TrainingError`` with the numbers unless the sampler computes the trained model.

        Two conditions: a mean of at most ``limit``, and nearer to the modules with 4-bit inputs
        than to those with 16-bit inputs. The second needs no threshold; it tells W4A4 from W4A16
        where rounding noise is as large as the effect of quantisation itself.
        """
        mean = fmean(self.gaps)
        nearest = fmean(self.dropped) if self.dropped else float("inf")
        numbers = (
            f"over {len(self.gaps)} sampled tokens, noise off, its log-probabilities differ from "
            f"the trained modules' by {mean:.4f} in the mean, {max(self.gaps):.4f} at most"
        )
        # First the fault that has a name: another one is far from both kinds of modules.
        if nearest <= min(mean, limit):
            raise TrainingError(
                f"rollout.engine {name} drops the quantisation of activations: {numbers}, but by "
                f"only {nearest:.4f} from modules with 16-bit inputs. Nothing was "
                "trained. Take an engine that computes W4A4 (vllm-ascend on an Ascend 950; vllm "
                "falls back to 16-bit inputs on most GPUs), or rollout.engine: hf"
            )
        if mean > limit:
            raise TrainingError(
                f"{OTHER_MODEL.format(name)}: {numbers}; dapo.logp_gap_limit is {limit:g}. Nothing "
                "was trained. Look at the engine's quantisation (npu-qat parity), or raise the "
                "limit if the noise floor of npu-qat parity run is that high"
            )
