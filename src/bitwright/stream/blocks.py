"""One block in memory at a time: load it, decide, quantize, write it, run it, free it.

The driver names no method and no format: it is handed callables.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby

from jaxtyping import Int
from torch import Tensor

from bitwright.core.account import BlockReport
from bitwright.core.block import Block
from bitwright.core.configuration import Configured
from bitwright.core.decisions import BlockDecisions
from bitwright.core.grid import Tile
from bitwright.core.method import Closed, Context, Learned, WeightContext
from bitwright.core.progress import Listener, Progress
from bitwright.core.scheme import Allocation
from bitwright.core.training import Training
from bitwright.core.weight import Weight
from bitwright.model.anatomy import BlockAnatomy
from bitwright.model.linears import linears_of
from bitwright.steps.apply import Folded, fold, require_held, weights_of
from bitwright.steps.outliers import bounds_of
from bitwright.stream.activations import Stream, StreamErrors, advance, enter, replay
from bitwright.stream.block_data import StreamedBlock
from bitwright.stream.memory import keep_freed_memory, peak_memory
from bitwright.stream.parts import Encoded, LinearSums, Part, PartWriter
from bitwright.stream.run_plan import RunPlan
from bitwright.stream.subject import Subject
from bitwright.stream.train import Trainer, learnables_of


@dataclass(frozen=True)
class BlockDriver:
    """A driver that goes through a model block by block; see ``parts.Driver``.

    With calibration ``tokens``, both streams of activations go through the blocks, and the reports have output errors.
    Without them, there is no forward pass.
    """

    subject: Subject
    plan: RunPlan
    writer: PartWriter
    tokens: Int[Tensor, "N T"] | None

    @property
    def units(self) -> list[str]:
        """The blocks, and the output layer if it is quantized."""
        return [block.name or block.path for block in self.subject.units(self.plan.allocation)]

    def parts(self, files: Mapping[str, str], done: Collection[str], listener: Listener) -> Iterator[Part]:
        """Quantize every block that is not done. A finished block is read back if later ones need its outputs."""
        units, run = list(self.subject.units(self.plan.allocation)), _Run(self.subject, self.plan, self.writer)
        names = self.units
        finished = sum(name in done for name in names)
        if finished:
            listener(Progress("quantize", finished, len(units), "blocks", resumed=True))
        keep_freed_memory()
        with ExitStack() as stack:
            stream = None if self.tokens is None else stack.enter_context(enter(self.subject.skeleton, self.tokens))
            for number, (unit, anatomy) in enumerate(zip(names, units, strict=True)):

                def inside(part: float = 0.0, detail: str = "", number: int = number, unit: str = unit) -> None:
                    listener(Progress("quantize", number, len(units), unit, peak_memory(), part, detail))

                part = None
                if unit in done and stream is None:
                    continue
                inside()
                before = stream if anatomy.name else None  # logits of every calibration token would be too large
                if before is not None:
                    self._reach(anatomy, before, run, dict(zip(names, units, strict=True)), files)
                with self.subject.loaded(anatomy) as whole:
                    block = run.quantized_part(whole)
                    if unit not in done:
                        part = run.quantize(block, anatomy, unit, files[unit], before, inside)
                    elif before is not None:
                        run.replay(block, anatomy, files[unit], before)
                if part is not None:
                    yield part
        listener(Progress("quantize", len(units), len(units), "all blocks", peak_memory()))

    def _reach(
        self,
        anatomy: BlockAnatomy,
        stream: Stream,
        run: "_Run",
        units: Mapping[str, BlockAnatomy],
        files: Mapping[str, str],
    ) -> None:
        """Go through blocks that the model calls once more before it comes to this one."""
        while stream.name != anatomy.path:
            again = next(other for other in units.values() if other.path == stream.name)
            with self.subject.loaded(again) as block:
                run.replay(run.quantized_part(block), again, files[again.name], stream)


@dataclass(frozen=True)
class _Run:
    """The arguments for quantizing blocks, and the steps for one block."""

    subject: Subject
    plan: RunPlan
    writer: PartWriter

    def quantized_part(self, block: Block) -> Block:
        """The block without the linears that stay in full precision; they are treated like its norms."""
        allocation = self.within(block)
        quantized = [name for name in block.topology.linears if allocation.of(name) is not None]
        attention = allocation.default.activations is not None or allocation.default.kv is not None
        return replace(block, topology=block.topology.only(quantized, attention))

    def within(self, block: Block) -> Allocation:
        """The schemes of a block's linears by their names in it: each expert has that of its stack."""
        allocation = self.plan.allocation
        schemes = {
            name: allocation.of(block.path(self.subject.weight_of(block, name))) for name in block.topology.linears
        }
        return Allocation(allocation.default, schemes)

    def replay(self, block: Block, anatomy: BlockAnatomy, file: str, stream: Stream) -> None:
        """Advance the streams by a finished block."""
        written = self._written(block, anatomy, file)
        replay(block, written, self.plan.allocation.default, stream, anatomy.joins)

    def _written(self, block: Block, anatomy: BlockAnatomy, file: str) -> dict[str, Tensor]:
        """The tensors of a finished block, dequantized, by their names in the block."""
        weights = self._quantized_weights(anatomy, block)
        grids = {weight: self.plan.allocation.scheme(weight.name).weight for weight in weights}
        single = {weight.name: grid for weight, grid in grids.items() if not weight.stacked}
        stacks = {weight.tensor: grid for weight, grid in grids.items() if weight.stacked}
        tensors, prefix = self.writer.read(file, single, stacks), f"{anatomy.name}."
        stored = set(block.layout.names)
        written = {n.removeprefix(prefix): t for n, t in tensors.items() if n.removeprefix(prefix) in stored}
        for weight in weights:
            whole = tensors[weight.tensor if weight.stacked else f"{weight.name}.weight"]
            slices = whole.unbind() if weight.stacked else (whole,)
            for linear, own in zip(linears_of(weight, anatomy.name), slices, strict=True):
                written[f"{linear}.weight"] = own.mT if weight.transposed else own
        return written

    def _quantized_weights(self, anatomy: BlockAnatomy, block: Block) -> list[Weight]:
        """The weights of a block that are quantized, in the order in which data flows through them."""
        quantized = {self.subject.weight_of(block, name): None for name in block.topology.linears}
        weights = {weight.name.removeprefix(f"{anatomy.name}."): weight for weight in anatomy.weights}
        return [weights[name] for name in quantized]

    def quantize(
        self,
        block: Block,
        anatomy: BlockAnatomy,
        unit: str,
        file: str,
        stream: Stream | None,
        inside: Callable[[float, str], None],
    ) -> Part:
        """Decide, quantize and write a block, and advance the streams by it; return its part."""
        plan, allocation = self.plan, self.within(block)
        data = None
        if stream is not None:
            inputs = stream.inputs(anatomy.joins)
            data = StreamedBlock(block, inputs, allocation, plan.scales, plan.all_experts)
        whole = {name: self.subject.weight_of(block, name) for name in block.topology.linears}
        stacks = {name: stack for name, stack in whole.items() if name != stack}
        decisions, learned = _decide(block, plan, allocation, data, stacks, inside)
        folded = fold(block.tensors, block.topology, decisions, allocation, plan.scales)
        folded = replace(folded, moved={**folded.moved, **self._left_out(block, anatomy, folded)})
        for name, quantized in folded.linears.items():
            require_held(block.path(name), folded.full[f"{name}.weight"], quantized)
        errors = None
        if stream is not None:
            errors = advance(block, folded, folded.written(), allocation.default, stream, anatomy.joins)
        report = BlockReport(unit, (), errors.block if errors else None, decisions.fallbacks)
        linears = [self._encoded(anatomy, weight, folded, errors) for weight in self._quantized_weights(anatomy, block)]
        passed = self._passed(block, anatomy, folded)
        return self.writer.write(unit, file, report, linears, passed, learned)

    def _left_out(self, block: Block, anatomy: BlockAnatomy, folded: Folded) -> dict[str, Tensor]:
        """The full-precision weights that a transform changed, in their dtype in the checkpoint."""
        names = {f"{linear}.weight" for linear in anatomy.topology.linears if linear not in folded.linears}
        dtype = self.subject.dtype_of(block)
        return {name: folded.full[name].to(dtype(name)) for name in names & folded.moved.keys()}

    def _encoded(self, anatomy: BlockAnatomy, weight: Weight, folded: Folded, errors: StreamErrors | None) -> Encoded:
        """A weight as it is stored, and its report."""
        linears = linears_of(weight, anatomy.name)
        slices = [folded.linears[name] for name in linears]
        shape = weight.shape if weight.stacked else slices[0].shape
        sums = LinearSums(weight.name, shape, self.writer)
        for name, quantized in zip(linears, slices, strict=True):
            sums.compare(folded.full[f"{name}.weight"], quantized)
        stored = [sums.add(quantized.transposed if weight.transposed else quantized) for quantized in slices]
        own = self.plan.allocation.own.get(weight.name)
        known = [errors.linears[name] for name in linears if name in errors.linears] if errors else []
        report = sums.report(sum(known) / len(known) if known else None, "" if own is None else str(own))
        if weight.stacked:
            return self.writer.format.encode_stacked(weight.tensor, stored), report
        return self.writer.format.encode(weight.name, stored[0]), report

    def _passed(self, block: Block, anatomy: BlockAnatomy, folded: Folded) -> dict[str, Tensor]:
        """The block's other tensors, as the checkpoint stores them or as the transform changed them."""
        if not anatomy.name:
            return {}
        checkpoint = self.subject.skeleton.checkpoint
        quantized = {weight.tensor for weight in self._quantized_weights(anatomy, block)}
        names = [n for n in checkpoint.names if n.startswith(f"{anatomy.name}.") and n not in quantized]
        stored = {name: checkpoint.read(name) for name in names}
        return stored | self.subject.as_stored(block, anatomy, folded.moved, stored)


def _decide(
    block: Block,
    plan: RunPlan,
    allocation: Allocation,
    data: StreamedBlock | None,
    stacks: Mapping[str, str],
    inside: Callable[[float, str], None],
) -> tuple[BlockDecisions, dict[str, Tensor]]:
    """Run all methods in order, neighbouring learned ones together; return the decisions and what was learned.

    The output layer has no stream: learned methods are skipped there. ``stacks`` are the parameters [E, ., .] of
    linears that are experts in one.
    """
    context = Context(plan.training or Training(), allocation, plan.scales, plan.seed, data)
    decisions, learned = BlockDecisions(), dict[str, Tensor]()
    if not block.topology.linears:
        return decisions, learned
    for trained, group in groupby(plan.methods, lambda configured: isinstance(configured.method, Learned)):
        methods = list(group)
        if not trained:
            for configured in methods:
                decisions = _alike(_decided(configured, block, context, decisions, stacks), stacks)
        elif data is not None:
            learnables = learnables_of(methods, block, context, decisions)
            objective = data.objective(context.settings)
            trainer = Trainer(block, learnables, context, decisions, objective, inside, plan.arithmetic)
            decisions = trainer.run() if plan.learned is None else trainer.adopt(plan.learned(block.name))
            learned |= trainer.learned
    return decisions, learned


def _alike(decisions: BlockDecisions, stacks: Mapping[str, str]) -> BlockDecisions:
    """The decisions, experts in one parameter with one tile: that of most of them."""
    tiles: dict[str, Counter[Tile | None]] = {}
    for linear, stack in stacks.items():
        tiles.setdefault(stack, Counter())[decisions.linear(linear).tile] += 1
    usual = {stack: counts.most_common(1)[0][0] for stack, counts in tiles.items() if len(counts) > 1}
    unlike = {linear: stack for linear, stack in stacks.items() if stack in usual}
    changed = {linear: replace(decisions.linear(linear), tile=usual[stack]) for linear, stack in unlike.items()}
    return decisions.with_linears(changed)


def _decided(
    configured: Configured,
    block: Block,
    context: Context[Training],
    decisions: BlockDecisions,
    stacks: Mapping[str, str],
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
        tiles = () if name in stacks and freedom.compared else freedom.tiles  # experts in one parameter share a tile
        alone = WeightContext(settings, scheme, context.scale_dtype, tiles, outliers)
        decided[name] = method.decide(weight, alone, decisions.linear(name))
    return decisions.with_linears(decided)
