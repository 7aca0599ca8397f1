"""The one loop that trains networks on public patients; a killed training goes on from its last state."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from cardiac_ldm.models.device import average_over_processes, compute_device, is_first_process, wait_for_all
from cardiac_ldm.progress import tqdm
from cardiac_ldm.settings import Precision
from cardiac_ldm.training.checkpoint import load_state, save_state, update_average

SAVE_EVERY = 30.0
"""Seconds between two states on the disk."""


@dataclass(frozen=True)
class Recipe:
    """How a network learns: by one cycle of the learning rate, which rises during a part `warm_up` of the steps.

    optimiser: makes one from parameters and a learning rate. clip: the largest norm of a gradient, or None.
    average_decay: of the moving average of the weights, which is what training leaves; None leaves the last weights.
    precision: of the forward pass.
    """

    steps: int
    learning_rate: float
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    warm_up: float = 0.1
    clip: float | None = 1.0
    average_decay: float | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Loss:
    """The loss of one step: terms that are added; `of_critic` gives the critic's own, once the network has moved."""

    terms: dict[str, Tensor]
    of_critic: Callable[[], Tensor] | None = None


def drawn_at(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """What a step that can be taken again draws from, alike on every device and in every process."""
    rng = np.random.default_rng([seed, step])
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def fit(
    network: nn.Module,
    loss_of: Callable[[int], Loss],
    recipe: Recipe,
    name: str,
    *,
    learns: Iterable[nn.Parameter] | None = None,
    critic: nn.Module | None = None,
    generator: torch.Generator | None = None,
    first: int = 0,
    state: Path | None = None,
) -> list[dict[str, float]]:
    """Train a network in place, on the device that computes; it's left there in evaluation mode.

    Under torch.distributed all processes must call it alike: `loss_of` takes its `own_share` of a batch that all have
    drawn, and gradients and losses are averaged. What isn't a mean over rows (Dice, say) is taken over each share.

    Args:
        loss_of: gives the loss of a step; the first is number `first`.
        learns: the parameters that move; all of the network's unless told.
        critic: learns from `Loss.of_critic`.
        generator: runs on from step to step, so the state holds where it is.
        state: the file to resume from; written every 30 s and at the end.

    Returns:
        The losses by step.
    """
    device = compute_device()
    network.to(device).train()
    parameters = list(network.parameters() if learns is None else learns)
    optimiser = recipe.optimiser(parameters, recipe.learning_rate)
    rate = OneCycleLR(optimiser, recipe.learning_rate, max(recipe.steps, 2), pct_start=recipe.warm_up)
    parts: dict[str, Any] = {"network": network, "optimiser": optimiser, "rate": rate}
    if critic is not None:
        of_critic = torch.optim.Adam(critic.to(device).parameters(), recipe.learning_rate, betas=(0.0, 0.99))
        parts |= {"critic": critic, "of_critic": of_critic}
    weights = {} if recipe.average_decay is None else dict(network.named_parameters())
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    losses: list[dict[str, float]] = []
    if saved := state and load_state(state):
        for part in parts:
            parts[part].load_state_dict(saved[part])
        for weight in average:
            average[weight].copy_(saved["average"][weight])
        losses = saved["losses"]
        if generator:
            generator.set_state(saved["generator"])
    wait_for_all()  # whoever has nothing left to do doesn't tidy up before all have read the state

    def save() -> None:
        if state and is_first_process():
            held = {part: parts[part].state_dict() for part in parts}
            save_state(state, losses=losses, average=average, generator=generator and generator.get_state(), **held)

    def move(of: torch.optim.Optimizer, loss: Tensor, moved: list[nn.Parameter], clip: float | None) -> None:
        of.zero_grad()
        loss.backward()
        average_over_processes([parameter.grad for parameter in moved if parameter.grad is not None])
        if clip is not None:
            nn.utils.clip_grad_norm_(moved, clip)
        of.step()

    def computing() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")

    written, begun = time.monotonic(), len(losses)
    with tqdm(total=recipe.steps, initial=begun, desc=name, unit="step", disable=not is_first_process()) as bar:
        for step in range(first + begun, first + recipe.steps):
            with computing():
                loss = loss_of(step)
            move(optimiser, total(loss.terms.values()), parameters, recipe.clip)
            rate.step()
            if loss.of_critic and critic is not None:
                with computing():
                    judged = loss.of_critic()
                move(of_critic, judged, list(critic.parameters()), None)
            if recipe.average_decay is not None:
                update_average(average, weights, step - first, recipe.average_decay)
            values = torch.stack([term.detach().float() for term in loss.terms.values()])
            average_over_processes([values])
            losses.append({"step": step} | dict(zip(loss.terms, values.tolist(), strict=True)))
            shown = next(iter(loss.terms))
            bar.set_postfix({shown: f"{np.mean([row[shown] for row in losses[-20:]]):.4f}"}, refresh=False)
            bar.update()
            if time.monotonic() - written > SAVE_EVERY:
                save()
                written = time.monotonic()
    if len(losses) > begun:
        save()
    with torch.no_grad():
        for weight in average:
            weights[weight].copy_(average[weight])
    network.eval()
    return losses


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars."""
    return torch.stack(list(terms)).sum()
