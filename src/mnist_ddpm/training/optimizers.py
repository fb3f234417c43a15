"""Muon for the hidden weight matrices, AdamW for the rest; and the learning rates of each step."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from mnist_ddpm.training.arguments import TrainingArguments

# Newton-Schulz: X <- a X + b (X X^T) X + c (X X^T)^2 X brings all singular values near 1 (Muon, Jordan et al., 2024)
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5
# modules whose weights are no hidden matrices: the first and the last layer, and what timestep and label pass through
ADAMW_MODULES = (
    "conv_in",
    "conv_out",
    "time_embedding",
    "time_emb_proj",
    "class_embedding",
    "sample_gain",
    "gain_map",
    "fourier_features",
    "heads",
)


def make_optimizer(unet: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW, or Muon for the hidden weight matrices and AdamW for the rest."""
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(
            unet.parameters(), args.learning_rate, betas, args.adam_epsilon, args.adam_weight_decay, fused=True
        )
    return MuonAdamW(
        *hidden_matrices(unet),
        muon_lr=args.muon_learning_rate,
        momentum=args.muon_momentum,
        lr=args.learning_rate,
        betas=betas,
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
    )


def learning_rate_factor(step: int, total_steps: int, args: TrainingArguments) -> float:
    """What the learning rates are multiplied by in a step (counted from 0): a function of the step alone.

    The schedules are those of diffusers' `get_scheduler` at its defaults, where `polynomial` has power 1 and
    `cosine_with_restarts` one cycle. `lr_decay_steps` makes of a constant rate warmup-stable-decay.
    """
    warmup = 0 if args.lr_scheduler == "constant" else args.lr_warmup_steps
    progress = (step - warmup) / max(1, total_steps - warmup)
    match args.lr_scheduler:
        case _ if step < warmup:
            factor = step / warmup
        case "linear" | "polynomial":
            factor = 1 - progress
        case "cosine" | "cosine_with_restarts":
            factor = (1 + math.cos(math.pi * progress)) / 2
        case _:
            factor = 1.0
    return factor * min(1.0, (total_steps - step) / max(1, args.lr_decay_steps))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """`U V^T` of the singular value decomposition `U S V^T`, approximately: singular values end between 0.7 and 1.2.

    Args:
        matrices: shape `(n, rows, columns)`, n of them at a time.

    Returns:
        bfloat16, of the same shape.
    """
    a, b, c = NS_COEFFICIENTS
    X: torch.Tensor = matrices.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    X = X.mT if tall else X  # X X^T is the smaller of the two products
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values of at most 1
    for _ in range(NS_STEPS):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A, in one kernel
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X.mT if tall else X


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for hidden weight matrices and AdamW (arXiv 1711.05101) for all other parameters.

    Muon: `m = mu m + (1 - mu) g`, `u = mu m + (1 - mu) g` (Nesterov), `W = W - lr sqrt(max(1, rows / columns)) U V^T`
    with `u = U S V^T`. A convolution's kernel counts as a matrix (out, in * k * k).

    `torch.optim.Muon` takes matrices only, one after the other; this one also takes kernels, those of one shape as one
    batch, and keeps both methods in one optimizer, so that a scheduler of the learning rate, a checkpoint and a clip
    of the gradient see one.

    Args:
        matrices: parameters of 2 or more dimensions, for Muon.
        others: all other parameters, for AdamW.
        muon_lr: Muon's learning rate: how far a step moves each singular value.
        momentum: Muon's mu.
        lr: AdamW's learning rate.
        betas: AdamW's beta_1 and beta_2.
        eps: AdamW's epsilon.
        weight_decay: of both, times the learning rate.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        muon_lr: float = 0.01,
        momentum: float = 0.95,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        groups = [
            {"params": list(matrices), "muon": True, "lr": muon_lr, "momentum": momentum},
            {"params": list(others), "muon": False, "lr": lr, "betas": betas, "eps": eps},
        ]
        super().__init__([group for group in groups if group["params"]], {"weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; AdamW's step counts go where the parameters are, as its kernel wants them there."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(p.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon_step if group["muon"] else self._adamw_step)(params, [p.grad for p in params], group)

    def _muon_step(self, params: list[torch.Tensor], grads: list[torch.Tensor], group: dict[str, Any]) -> None:
        mu = group["momentum"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - mu)
        updates = torch._foreach_lerp(grads, momenta, mu)  # Nesterov: what the momentum will be if the gradient stays

        by_shape = defaultdict(list)
        for p, update in zip(params, updates, strict=True):
            by_shape[p.shape].append((p, update.flatten(1)))
        for shape, pairs in by_shape.items():
            directions = orthogonalize(torch.stack([update for _, update in pairs])).to(pairs[0][0].dtype)
            rows, columns = directions.shape[1:]
            for (p, _), direction in zip(pairs, directions, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(direction.view(shape), alpha=group["lr"] * max(1, rows / columns) ** 0.5)

    def _adamw_step(self, params: list[torch.Tensor], grads: list[torch.Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                zeros = (torch.zeros_like(p), torch.zeros_like(p))
                self.state[p] |= dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        states = [self.state[p] for p in params]
        adamw(
            params,
            grads,
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a U-Net, ours or diffusers', that Muon is for, and all others."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        hidden = p.ndim >= 2 and not set(ADAMW_MODULES) & set(name.split("."))
        (matrices if hidden else others).append(p)
    return matrices, others
