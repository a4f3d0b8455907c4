"""torch's AdamW, with one parameter group per learning rate and weight decay; engines use the same groups."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from sst2_xlmr.config import Config
from sst2_xlmr.model.weights import layer_of
from sst2_xlmr.util.distributed import World
from sst2_xlmr.util.tensors import TensorLike

BETAS = (0.9, 0.999)
# RoBERTa's (https://arxiv.org/abs/1907.11692, table 10). With Adam's 1e-8, a weight whose gradient is only rounding
# noise (the attention's key bias has none in exact arithmetic) would take whole steps in random directions.
EPSILON = 1e-6


def group_of(name: str, parameter: torch.Tensor, layers: int, config: Config) -> tuple[float, float]:
    """Return a parameter's learning rate factor, --layerwise-lr-decay ** distance, and its weight decay.

    The distance from the head is 0 for the head itself, and 1 + layers for the embeddings. Biases and LayerNorm, the
    only vectors, do not decay, as in BERT.
    """
    distance = 0 if name.startswith("head.") else layers - layer_of(name)
    return config.layerwise_lr_decay**distance, config.weight_decay if parameter.dim() > 1 else 0.0


class AdamW:
    """`torch.optim.AdamW` over a model's trained parameters, fp32; an engine's has the same methods and state."""

    shares_memory = False  # whether all processes have one copy of the weights

    def __init__(self, model: nn.Module, layers: int, config: Config, world: World) -> None:
        self._world, self._model = world, model
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self._trained.items():
            groups.setdefault(group_of(name, parameter, layers, config), []).append(parameter)
        settings = [{"params": own, "scale": scale, "weight_decay": decay} for (scale, decay), own in groups.items()]
        self._is_fused = world.device.type == "cuda" or torch.__version__ >= "2.4"  # the first with it on CPUs
        self._optimizer = torch.optim.AdamW(settings, lr=0.0, betas=BETAS, eps=EPSILON, fused=self._is_fused or None)
        self._set_state({}, 0)

    def _set_state(self, moments: Mapping[str, torch.Tensor], steps: int) -> None:
        on = self._world.device if self._is_fused else None
        for name, parameter in self._trained.items():
            state = self._optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=on)}
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind] = moments[f"{kind}.{name}"].to(parameter.device) if moments else torch.zeros_like(parameter)

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> torch.Tensor:
        """Clip the averaged gradients' global norm (0: never); returns the unclipped norm, fp32, same on every rank."""
        parameters = list(self._trained.values())
        is_one_node = self._world.world_size == self._world.local_world_size
        norm = nn.utils.clip_grad_norm_(parameters, max_norm if max_norm and is_one_node else math.inf)
        if not is_one_node:  # other CPUs may sum in another order: all ranks take rank 0's norm
            dist.broadcast(norm, 0)
            if max_norm:
                scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad *= scale
        return norm

    def step(self, lr: float) -> None:
        """Take one step, at this learning rate before layer-wise decay."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, TensorLike]:
        """Return parameter name -> fp32 weights, of the whole model."""
        return {name: parameter.data for name, parameter in self._model.named_parameters()}

    def moments(self) -> dict[str, torch.Tensor]:
        """Return `exp_avg.NAME` and `exp_avg_sq.NAME`, fp32, of all trained parameters."""
        return {
            f"{kind}.{name}": self._optimizer.state[parameter][kind]
            for name, parameter in self._trained.items()
            for kind in ("exp_avg", "exp_avg_sq")
        }

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], steps: int) -> None:
        """Load another optimizer's weights and moments, after `steps` steps."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])
        self._set_state(moments, steps)
