"""Learned methods, trained on one block: the block-wise error minimisation of OmniQuant (arXiv 2308.13137, eq. 1).

    minimise || F(W, X) - F(Q(W), Q(X')) ||^2        X the full-precision stream, X' the quantized one

The trainer names no method: learnables say how their parameters replace the block's. Candidate zero is the block
without training. If the loss is not finite, or rises, training goes back to the best parameters so far, with a lower
learning rate. The result is never worse than candidate zero on the objective, which is measured on the folded block, as
it will be written.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from bitwright.core.block import Block
from bitwright.core.configuration import Configured
from bitwright.core.decisions import BlockDecisions
from bitwright.core.fake_quant import FakeQuantizer
from bitwright.core.grid import Tile
from bitwright.core.method import TOO_FEW, Context, Learnable, Learned, Measured, Moments, Range
from bitwright.core.scheme import Scheme
from bitwright.core.training import Training
from bitwright.steps.activations import quantized_activations
from bitwright.steps.apply import Folded, fold
from bitwright.steps.ranges import minmax
from bitwright.stream.activations import Activations
from bitwright.stream.forward import forward, outputs_of
from bitwright.stream.moments import MomentsAhead
from bitwright.stream.precision import rounding_inputs, running_dtype, written_out_attention

RETRIES = 3
SLOWER = 0.3
RISE = 1.5


def _known(moments: Moments, *, drift: bool) -> Moments:
    return moments


@dataclass(frozen=True)
class Objective:
    """The inputs of both streams and the outputs that the block should have, a tensor for each segment, on the CPU.

    ``target`` is the full-precision block's output on ``inputs.reference``; ``also`` is its output on
    ``inputs.quantized``, the second target of the augmented loss.
    """

    inputs: Activations
    target: Sequence[Tensor]
    also: Sequence[Tensor] | None

    def loss(self, outputs: Tensor, rows: Sequence[int]) -> Tensor:
        """The mean squared error of the outputs for some segments."""
        outputs, dim = outputs.float(), self.inputs.quantized.calls[0].batch_dim
        wanted = [torch.cat([targets[row] for row in rows], dim) for targets in (self.target, self.also) if targets]
        return torch.stack([F.mse_loss(outputs, target.to(outputs)) for target in wanted]).sum()


def learnables_of(
    methods: Sequence[Configured], block: Block, context: Context[Training], decided: BlockDecisions
) -> list[Learnable]:
    """The learnables of learned methods; each starts from the decisions at which the earlier ones start."""
    parameters: Mapping[str, Tensor] = {name: p.float() for name, p in block.tensors.items()}
    learnables: list[Learnable] = []
    for configured in methods:
        assert isinstance(configured.method, Learned)
        own = context.with_settings(configured.settings(context.allocation.default))
        learnables.append(configured.method.learn(block, own, decided))
        with torch.no_grad():
            parameters = learnables[-1].transform(parameters)
            decided = learnables[-1].decide(parameters, decided)
    return learnables


class Trainer:
    """The training of one block's learnables."""

    def __init__(
        self,
        block: Block,
        learnables: Sequence[Learnable],
        context: Context[Training],
        decided: BlockDecisions,
        objective: Objective,
        report: Callable[[float, str], None] = lambda part, detail: None,
        arithmetic: torch.dtype | None = None,
    ) -> None:
        """Start from ``decided``, the decisions of earlier methods.

        ``report`` is called after every epoch. ``arithmetic`` is the dtype of a step's matrix products, by default the
        block's own.
        """
        self.block, self.learnables, self.context = block, learnables, context
        self.decided, self.objective, self.report = decided, objective, report
        self.base = {name: p.float() for name, p in block.tensors.items()}
        self.refines = any(learnable.refines for learnable in learnables)
        held = block.dtype
        self.arithmetic = arithmetic or held
        self.running = running_dtype(held, self.arithmetic)
        schemes = {name: context.scheme(name) for name in block.topology.linears}
        tiles = [decided.tile(name, scheme) for name, scheme in schemes.items()]
        grids = [scheme.weight for scheme in schemes.values()]
        self.quantizer = FakeQuantizer(tiles, grids, context.scale_dtype, self.arithmetic)
        self.fallbacks: list[str] = []
        self.learned: dict[str, Tensor] = {}

    @property
    def activations(self) -> Scheme:
        """A scheme with the activations and KV cache of all linears."""
        return self.context.allocation.default

    def adopt(self, learned: Mapping[str, Tensor]) -> BlockDecisions:
        """The decisions of an earlier training's parameters; ``learned`` is empty if it kept the start."""
        if not learned:
            return self.decided
        with torch.no_grad():
            for learnable in self.learnables:
                for name, parameter in learnable.parameters.items():
                    parameter.copy_(learned[name])
        self.learned = dict(learned)
        return self.decisions()

    def run(self) -> BlockDecisions:
        """Train, and return the best decisions: those before training if nothing was better."""
        zero = self.measure(self.decided)
        with written_out_attention(self.block, self.arithmetic), quantized_activations(self.block, self.activations):
            self._train()
        loss = self.measure(self.decisions())
        if self.refines:
            loss = self._refine(loss)
        if not loss < zero:
            self.fallbacks.append(f"nothing better than the start was found ({loss:.4g}, start {zero:.4g}): start kept")
            return replace(self.decided, fallbacks=(*self.decided.fallbacks, *self.fallbacks))
        best, parameters = self.decisions(), [learnable.parameters for learnable in self.learnables]
        self.learned = {name: p.detach().clone() for named in parameters for name, p in named.items()}
        return replace(best, fallbacks=(*best.fallbacks, *self.fallbacks))

    def decisions(self) -> BlockDecisions:
        """The decisions of the current parameters."""
        decisions = self.decided
        parameters: Mapping[str, Tensor] = self.base
        with torch.no_grad():
            for learnable in self.learnables:
                parameters = learnable.transform(parameters)
                decisions = learnable.decide(parameters, decisions)
        return decisions

    def measure(self, decisions: BlockDecisions) -> float:
        """The objective of the folded block, over all segments."""
        objective, allocation = self.objective, self.context.allocation
        written = fold(self.base, self.block.topology, decisions, allocation, self.context.scale_dtype).written()
        with quantized_activations(
            self.block, self.activations
        ):  # in batches: all outputs would take the memory of one more stream
            outputs = outputs_of(self.block, written, objective.inputs.quantized)
            losses = [float(objective.loss(output, [row])) for row, output in enumerate(outputs)]
        return sum(losses) / len(losses)

    def substituted(self) -> dict[str, Tensor]:
        """The block's parameters, transformed and fake-quantized, in the dtype that a step runs in.

        They are differentiable in every learnable.
        """
        parameters: Mapping[str, Tensor] = self.base
        for learnable in self.learnables:
            parameters = learnable.transform(parameters)
        names = self.block.topology.linears
        whole = {name: parameters[f"{name}.weight"] for name in names}
        inside = {name: self.decided.linear(name).inside(whole[name]) for name in names}
        ranges = [self._range(name, inside[name], tile) for name, tile in zip(names, self.quantizer.tiles, strict=True)]
        quantized = {name: p.to(self.running) for name, p in parameters.items()}
        for name, fake in zip(names, self.quantizer(list(inside.values()), ranges), strict=True):
            kept = self.decided.linear(name).outliers
            quantized[f"{name}.weight"] = fake if kept is None else whole[name].to(fake.dtype).where(kept, fake)
        return quantized

    def _range(self, linear: str, weight: Float[Tensor, "O I"], tile: Tile) -> Range:
        """The learned range of a linear, or else min-max."""
        learned = (learnable.range(linear, weight, tile) for learnable in self.learnables)
        return next((ends for ends in learned if ends is not None), None) or minmax(weight, tile)

    def _refine(self, trained: float) -> float:
        """Search the ranges again in closed form, linear after linear in the order in which data flows.

        The trained ranges come back if they are better.
        """
        snapshot, groups = self._snapshot(), self.block.topology.groups
        ahead, full = MomentsAhead(self.block, self.activations, self.objective.inputs), self._folded().full
        for done, group in enumerate(groups):
            self._report(self.context.settings.epochs + done, f"refining {group.linears[0]}")
            measured: Measured = cache(partial(ahead.of, group.linears[0], self._folded))
            if group.routed:  # measured once: experts have no drift
                moments = ahead.of(group.linears[0], self._folded, drift=False)
                if moments.tokens < TOO_FEW:
                    continue
                measured = partial(_known, moments)
            for name in group.linears:
                weight = self.decided.linear(name).inside(full[f"{name}.weight"])
                for learnable in self.learnables:
                    if learnable.refines:
                        learnable.refine(name, weight, measured)
        loss = self.measure(self.decisions())
        if loss < trained:
            return loss
        self._restore(snapshot)
        self.fallbacks.append(f"refined ranges are no better ({loss:.4g}, before {trained:.4g}): kept as they were")
        return trained

    def _folded(self) -> Folded:
        """The block as the current parameters decide it."""
        context = self.context
        return fold(self.base, self.block.topology, self.decisions(), context.allocation, context.scale_dtype)

    def _train(self) -> None:
        """Train until all epochs are done, or too many failed; then take the best parameters."""
        if not self.context.settings.epochs:
            return
        best, best_loss, rate = self._snapshot(), math.inf, 1.0
        for attempt in range(RETRIES + 1):
            epoch_losses, best, best_loss = self._attempt(rate, best, best_loss)
            if epoch_losses[-1] <= RISE * best_loss:
                break
            if attempt == RETRIES:
                self.fallbacks.append(f"loss still not falling in attempt {attempt + 1}: the best parameters kept")
                break
            rate *= SLOWER
            what = "not finite" if not math.isfinite(epoch_losses[-1]) else "rising"
            self.fallbacks.append(f"loss {what} in attempt {attempt + 1}: back to the best, learning rate x {rate:.3g}")
            self._restore(best)
        self._restore(best)

    def _attempt(self, rate: float, best: list[Tensor], best_loss: float) -> tuple[list[float], list[Tensor], float]:
        training = self.context.settings
        generator = torch.Generator().manual_seed(self.context.seed + 1000 * self.block.index)
        count = len(self.objective.target)
        total = training.epochs * math.ceil(count / training.batch_size)
        optimizer, scheduler = self._optimizer(rate, total)
        losses: list[float] = []
        for _ in range(training.epochs):
            sums = torch.zeros(())
            order = torch.randperm(count, generator=generator)
            for rows in order.split(training.batch_size):
                sums += self._step(rows.tolist(), optimizer) * len(rows)
                scheduler.step()
            losses.append(float(sums) / count)
            self._report(len(losses), f"epoch {len(losses)}/{training.epochs} loss {losses[-1]:.4g}")
            if losses[-1] < best_loss and all(p.isfinite().all() for p in self._parameters()):
                best, best_loss = self._snapshot(), losses[-1]
            if not losses[-1] <= RISE * best_loss:
                break
        return losses, best, best_loss

    def _step(self, rows: Sequence[int], optimizer: torch.optim.Optimizer) -> Tensor:
        inputs = self.objective.inputs.quantized
        parameters = self.substituted()
        losses = []
        for joined in inputs.batches(rows, len(rows) * inputs.length):
            call = inputs.call(joined, self.block, self.running)
            with rounding_inputs(self.block.device, self.arithmetic):
                outputs = forward(self.block, parameters, call)
            losses.append(self.objective.loss(outputs, joined) * (len(joined) / len(rows)))
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach().cpu()

    def _optimizer(self, rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
        groups = [
            {"params": list(tensors.values()), "lr": lr * rate}
            for learnable in self.learnables
            for tensors, lr in learnable.groups.values()
            if tensors
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        if self.context.settings.schedule == "constant":
            return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def _report(self, done: int, detail: str) -> None:
        """Report progress within the block: epochs first, then refined groups."""
        training = self.context.settings
        stages = training.epochs + (len(self.block.topology.groups) if self.refines else 0)
        self.report(done / (stages + 1), detail)

    def _parameters(self) -> list[Tensor]:
        return [p for learnable in self.learnables for p in learnable.parameters.values()]

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._parameters()]

    @torch.no_grad()
    def _restore(self, snapshot: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters(), snapshot, strict=True):
            parameter.copy_(value)
