"""One block in memory at a time: load it, decide, quantize, write it, run it, free it.

The driver names no method and no format: it is handed callables.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from jaxtyping import Int
from torch import Tensor

from bitwright.core.account import BlockReport
from bitwright.core.block import Block
from bitwright.core.configuration import Configured
from bitwright.core.decisions import BlockDecisions
from bitwright.core.method import Closed, Context, Learned, WeightContext
from bitwright.core.progress import Listener, Progress
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training
from bitwright.steps.apply import Folded, fold, require_held, weights_of
from bitwright.steps.outliers import bounds_of
from bitwright.stream.activations import Stream, StreamErrors, advance, enter, replay
from bitwright.stream.block_data import StreamedBlock
from bitwright.stream.memory import keep_freed_memory, peak_memory
from bitwright.stream.parts import Encoded, LinearSums, Part, PartWriter
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.skeleton import Skeleton
from bitwright.stream.train import Trainer, learnables_of


@dataclass(frozen=True)
class BlockDriver:
    """A driver that goes through a model block by block; see ``parts.Driver``.

    With calibration ``tokens``, both streams of activations go through the blocks, and the reports have output errors.
    Without them, there is no forward pass.
    """

    skeleton: Skeleton
    plan: RunPlan
    writer: PartWriter
    tokens: Int[Tensor, "N T"] | None

    @property
    def units(self) -> list[str]:
        """The blocks, and the output layer if it is quantized."""
        return [unit for unit, _ in _units(self.skeleton, self.plan.allocation)]

    def parts(self, files: Mapping[str, str], done: Collection[str], listener: Listener) -> Iterator[Part]:
        """Quantize every block that is not done. A finished block is read back if later ones need its outputs."""
        units, run = list(_units(self.skeleton, self.plan.allocation)), _Run(self.skeleton, self.plan, self.writer)
        finished = sum(unit in done for unit, _ in units)
        if finished:
            listener(Progress("quantize", finished, len(units), "blocks", resumed=True))
        keep_freed_memory()
        stream = None if self.tokens is None else enter(self.skeleton, self.tokens)
        for number, (unit, load) in enumerate(units):

            def inside(part: float = 0.0, detail: str = "", number: int = number, unit: str = unit) -> None:
                listener(Progress("quantize", number, len(units), unit, peak_memory(), part, detail))

            part = None
            if unit in done and stream is None:
                continue
            inside()
            with load() as whole:
                block = run.quantized_part(whole)
                if unit not in done:
                    part, stream = run.quantize(block, unit, files[unit], stream, inside)
                elif stream is not None and block.name:
                    written = run.written(block, files[unit])
                    stream = replay(block, written, self.plan.allocation.default, stream, in_place=True)
            if part is not None:
                yield part
        listener(Progress("quantize", len(units), len(units), "all blocks", peak_memory()))


def _units(
    skeleton: Skeleton, allocation: Allocation
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Block]]]]:
    for index, name in enumerate(skeleton.block_names):
        yield name, partial(skeleton.block, index)
    if allocation.of(skeleton.family.head) is not None:
        yield skeleton.family.head, skeleton.head


@dataclass(frozen=True)
class _Run:
    """The arguments for quantizing blocks, and the steps for one block."""

    skeleton: Skeleton
    plan: RunPlan
    writer: PartWriter

    def quantized_part(self, block: Block) -> Block:
        """The block without the linears that stay in full precision; they are treated like its norms."""
        allocation = self.plan.allocation
        quantized = [name for name in block.topology.linears if allocation.of(block.path(name)) is not None]
        attention = allocation.default.activations is not None or allocation.default.kv is not None
        return replace(block, topology=block.topology.only(quantized, attention))

    def written(self, block: Block, file: str) -> dict[str, Tensor]:
        """The parameters of a finished block, dequantized, by their names in the block."""
        schemes = {path: self.plan.allocation.scheme(path) for path in map(block.path, block.topology.linears)}
        tensors = self.writer.read(file, {path: scheme.weight for path, scheme in schemes.items()})
        stored, prefix = dict(block.module.named_parameters()), f"{block.name}."
        names = {name: name.removeprefix(prefix) for name in tensors}
        return {short: tensors[name] for name, short in names.items() if short in stored}

    def quantize(
        self,
        block: Block,
        unit: str,
        file: str,
        stream: Stream | None,
        inside: Callable[[float, str], None],
    ) -> tuple[Part, Stream | None]:
        """Decide, quantize and write a block; return its part, and the streams after it."""
        plan, allocation = self.plan, self.plan.allocation.within(block.name)
        decisions, learned = _decide(block, plan, allocation, stream, inside)
        folded = fold(dict(block.module.named_parameters()), block.topology, decisions, allocation, plan.scales)
        folded = replace(folded, moved={**folded.moved, **self._left_out(block, folded)})
        for name, quantized in folded.linears.items():
            require_held(block.path(name), folded.full[f"{name}.weight"], quantized)
        after, errors = stream, None
        if (
            stream is not None and block.name
        ):  # the output layer's outputs, logits of every calibration token, would be too large
            after, errors = advance(block, folded, folded.written(), allocation.default, stream, in_place=True)
        report = BlockReport(unit, (), errors.block if errors else None, decisions.fallbacks)
        linears = [self._encoded(block, name, folded, errors) for name in folded.linears]
        passed = _passed(self.skeleton, block, folded)
        return self.writer.write(unit, file, report, linears, passed, learned), after

    def _left_out(self, block: Block, folded: Folded) -> dict[str, Tensor]:
        """The full-precision weights that a transform changed, in their dtype in the checkpoint."""
        names = {f"{linear}.weight" for linear in self.skeleton.family.topology.linears if linear not in folded.linears}
        entry = self.skeleton.checkpoint.entry
        return {name: folded.full[name].to(entry(block.path(name)).dtype) for name in names & folded.moved.keys()}

    def _encoded(self, block: Block, name: str, folded: Folded, errors: StreamErrors | None) -> Encoded:
        """A linear as it is stored, and its report."""
        path, quantized = block.path(name), folded.linears[name]
        sums = LinearSums(path, quantized.shape, self.writer)
        sums.compare(folded.full[f"{name}.weight"], quantized)
        sums.add(quantized)
        own = self.plan.allocation.own.get(path)
        report = sums.report(errors.linears[name] if errors else None, "" if own is None else str(own))
        return self.writer.encoded(path, quantized, report)


def _decide(
    block: Block,
    plan: RunPlan,
    allocation: Allocation,
    stream: Stream | None,
    inside: Callable[[float, str], None],
) -> tuple[BlockDecisions, dict[str, Tensor]]:
    """Run all methods in order, neighbouring learned ones together; return the decisions and what was learned.

    The output layer has no stream: learned methods are skipped there.
    """
    data = None if stream is None or not block.name else StreamedBlock(block, stream, allocation, plan.scales)
    context = Context(plan.training or Training(), allocation, plan.scales, plan.seed, data)
    decisions, learned = BlockDecisions(), dict[str, Tensor]()
    if not block.topology.linears:
        return decisions, learned
    for trained, group in groupby(plan.methods, lambda configured: isinstance(configured.method, Learned)):
        methods = list(group)
        if not trained:
            for configured in methods:
                decisions = _decided(configured, block, context, decisions)
        elif data is not None:
            learnables = learnables_of(methods, block, context, decisions)
            objective = data.objective(context.settings)
            trainer = Trainer(block, learnables, context, decisions, objective, inside, plan.arithmetic)
            decisions = trainer.run() if plan.learned is None else trainer.adopt(plan.learned(block.name))
            learned |= trainer.learned
    return decisions, learned


def _decided(
    configured: Configured, block: Block, context: Context[Training], decisions: BlockDecisions
) -> BlockDecisions:
    """The decisions after one method that is not trained."""
    method = configured.method
    assert not isinstance(method, Learned)
    if isinstance(method, Closed):
        return method.decide(block, context.with_settings(configured.settings(context.allocation.default)), decisions)
    decided = {}
    for name, weight in weights_of(block, decisions).items():
        scheme = context.scheme(name)
        settings, freedom = configured.settings(scheme), configured.freedom(scheme)
        outliers = bounds_of(weight, scheme.tile, freedom.outliers)
        alone = WeightContext(settings, scheme, context.scale_dtype, freedom.tiles, outliers)
        decided[name] = method.decide(weight, alone, decisions.linear(name))
    return decisions.with_linears(decided)


def _passed(skeleton: Skeleton, block: Block, folded: Folded) -> dict[str, Tensor]:
    """The block's other tensors, as the checkpoint stores them or as the transform changed them."""
    if not block.name:
        return {}
    quantized = {f"{block.path(name)}.weight" for name in block.topology.linears}
    names = [n for n in skeleton.checkpoint.names if n.startswith(f"{block.name}.") and n not in quantized]
    stored = {name: skeleton.checkpoint.read(name) for name in names}
    return stored | {block.path(name): tensor for name, tensor in folded.moved.items()}
