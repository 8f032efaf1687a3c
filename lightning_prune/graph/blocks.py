"""Residual blocks: what adds nothing to the sum of ``x + f(x)`` once its last layer is zero, and may be pruned as one.

A pass of the full network notes which operators use what others have made. Where two tensors are added, one of which
the other is computed from, all that is used for that other one alone is the branch of a block. The modules that run
nothing but parts of a branch leave with it: they return zeros then, so that the code around them runs as it is written.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.channel_graph import Group
from lightning_prune.graph.fitting import Fitting
from lightning_prune.graph.nested import nested_tensors
from lightning_prune.graph.operators import Operator
from lightning_prune.graph.records import Call, CallKey, ModuleCall
from lightning_prune.graph.run import ALL_KEPT, Forward
from lightning_prune.graph.slots import module_of
from lightning_prune.graph.substitution import submodules
from lightning_prune.graph.tracer import Tracer
from lightning_prune.pruning_plan import Absence, Count, Slice

__all__ = ["Block", "Flow", "find_blocks"]

_SUMS = frozenset({"aten.add", "aten.add_"})
Steps = int
"""Numbers of operators, in the order in which they have run, as the bits of a whole number."""


@dataclass(frozen=True)
class Block:
    """A residual block that can be pruned.

    Attributes:
        group: The group that it is, of a single channel.
        absences: What its modules return once it is pruned, by their names.
    """

    group: Group
    absences: Mapping[str, Absence]

    @property
    def modules(self) -> list[str]:
        """The names of the modules that are pruned with it."""
        return list(self.absences)


@dataclass(frozen=True)
class _Step:
    """An operator that has run.

    Attributes:
        is_sum: Whether it adds two tensors of one shape.
        sources: The operators that have made each tensor which it was given.
        read: Names of the parameters among these.
    """

    is_sum: bool
    sources: list[Steps]
    read: list[str]


class Flow(Tracer):
    """Follow what each operator uses of what others have made.

    Attributes:
        steps: The operators that have run.
        spans: The numbers of the first operator in each call of a module and of the first one behind, by its name.
        returned: The operators that have made what the network returns.
    """

    def __init__(self, tables: Any, known: Any) -> None:
        super().__init__(tables, known)
        self.steps: list[_Step] = []
        self.spans: dict[str, list[tuple[int, int]]] = {}
        self.returned: Steps = 0
        self._made: dict[int, int] = {}  # by id of a tensor, the operator that has made it
        self._written: dict[int, Steps] = {}  # by memory, the operators that have written to it
        self._seen: list[Tensor] = []  # as long as they are there, their ids mean them

    def _run_module(self, name: str, forward: Any, args: Any, kwargs: Any) -> Any:
        start = len(self.steps)
        output = super()._run_module(name, forward, args, kwargs)
        spans = self.spans.setdefault(name, [])
        spans.append((start, len(self.steps)))
        if not self.modules:
            for tensor in nested_tensors(output):
                self.returned |= self._sources(tensor)
        return output

    def _note_operator(self, operator: Operator, call: Call, inputs: list[Tensor]) -> None:
        super()._note_operator(operator, call, inputs)
        number = len(self.steps)
        shapes = {tensor.shape for tensor in inputs}
        is_sum = call.name in _SUMS and len(inputs) == 2 and len(shapes) == 1
        sources = []
        read = []
        for tensor in inputs:
            sources.append(self._sources(tensor))
            name = getattr(tensor, "_dotted_name", "")
            if name:
                read.append(name)
        step = _Step(is_sum, sources, read)
        self.steps.append(step)
        for tensor in operator.written_among(call):
            memory = _memory_of(tensor)
            before = self._written.get(memory, 0)
            self._written[memory] = before | 1 << number
        for tensor in call.outputs:
            self._made[id(tensor)] = number
            self._seen.append(tensor)

    def _sources(self, tensor: Tensor) -> Steps:
        """Return the operators that have made a tensor, or written to it."""
        memory = _memory_of(tensor)
        sources = self._written.get(memory, 0)
        number = self._made.get(id(tensor))
        if number is not None:
            sources |= 1 << number
        return sources


def _memory_of(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage._cdata


def _numbers(steps: Steps) -> Iterator[int]:
    """Yield the numbers of operators, the last one first."""
    while steps:
        last = steps.bit_length() - 1
        yield last
        steps ^= 1 << last


@dataclass
class _Branches:
    """Find the branches of sums.

    Args:
        flow: What a pass has shown.

    Attributes:
        behind: For each operator, all that what it makes is computed by, itself included.
        users: For each operator, those that use what it makes.
        used: All that what the network returns is computed by.
    """

    flow: Flow
    behind: list[Steps] = field(default_factory=list)
    users: list[Steps] = field(default_factory=list)
    used: Steps = 0

    def __post_init__(self) -> None:
        for number, step in enumerate(self.flow.steps):
            every = 1 << number
            for source in step.sources:
                every |= self._all_behind(source)
                for user_of in _numbers(source):
                    self.users[user_of] |= 1 << number
            self.behind.append(every)
            self.users.append(0)
        self.used = self._all_behind(self.flow.returned)

    def _all_behind(self, steps: Steps) -> Steps:
        every = 0
        for number in _numbers(steps):
            every |= self.behind[number]
        return every

    def each(self) -> Iterator[Steps]:
        """Yield the operators of each branch, those that end first before others."""
        for number, step in enumerate(self.flow.steps):
            if not step.is_sum or not self.used >> number & 1:
                continue
            first, second = step.sources
            for branch, other in ((first, second), (second, first)):
                behind = self._all_behind(branch)
                inside = self._used_alone(behind & ~self._all_behind(other), 1 << number)
                if inside and self._passes_on(other, behind):
                    yield inside

    def _passes_on(self, other: Steps, behind: Steps) -> bool:
        """Tell whether one side of a sum is what a branch is computed from, perhaps with other branches added to it."""
        for number in _numbers(other):
            if behind >> number & 1:
                return True
            step = self.flow.steps[number]
            if step.is_sum and any(self._passes_on(source, behind) for source in step.sources):
                return True
        return False

    def _used_alone(self, steps: Steps, by: Steps) -> Steps:
        """Return those of some operators that nothing uses but others of them and one more."""
        found = by
        for number in _numbers(steps):
            users = self.users[number] & self.used
            if not users & ~found and not self.flow.returned >> number & 1:
                found |= 1 << number
        return found & ~by


@dataclass
class _Finding:
    """Find the blocks of a network.

    Args:
        forward: The forward pass.
        flow: What it has shown.
        fitting: Finds out which sizes follow channels.
        kept: Names of modules that have to stay.

    Attributes:
        refused: Why branches are no blocks that can be pruned, by name.
    """

    forward: Forward
    flow: Flow
    fitting: Fitting
    kept: Sequence[str]
    refused: dict[str, str] = field(default_factory=dict)

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks that can be pruned."""
        branches = _Branches(self.flow)
        taken: list[str] = []
        for branch in branches.each():
            modules = self._inside(branch, branches.used)
            last = self._last_read(branch, modules)
            is_taken = any(_overlap(name, taken) for name in modules)
            if not last or is_taken:
                continue
            taken += modules
            name = f"{modules[-1]}#block"
            reason = self._reason_to_stay(modules, branch)
            absences = {} if reason else self._absences(name, modules)
            if len(absences) < len(modules):
                self.refused[name] = (
                    reason or f"{modules[-1]}: one of the block's modules returns no tensor that is known"
                )
                continue
            yield Block(self._group(name, modules, last), absences)

    def _inside(self, branch: Steps, used: Steps) -> list[str]:
        """Return the names of the outermost modules that run once, and nothing but parts of a branch, in order."""
        found: dict[str, int] = {}
        for name in self.forward.module_names:
            spans = self.flow.spans.get(name, [])
            if len(spans) != 1 or _is_in(name, found):
                continue
            [(start, stop)] = spans
            every = (1 << stop) - (1 << start)
            running = every & used
            beside = running & ~branch
            if running and not beside:
                found[name] = start
        return sorted(found, key=found.__getitem__)

    def _last_read(self, branch: Steps, modules: Sequence[str]) -> str:
        """Return the name of the module whose parameters are the last to be read in a branch, empty for none."""
        for number in _numbers(branch):
            for name in self.flow.steps[number].read:
                owner = module_of(name)
                if _is_in(owner, modules):
                    return owner
        return ""

    def _reason_to_stay(self, modules: Sequence[str], branch: Steps) -> str:
        """Say why modules of a branch have to stay, empty if they need not."""
        for name in modules:
            if _overlap(name, self.kept):
                return f"{name}: is ignored or frozen"
        tensors = set(self._tensors(modules))
        for number, step in enumerate(self.flow.steps):
            shared = tensors.intersection(step.read)
            is_outside = not branch >> number & 1
            if shared and is_outside:
                return f"{min(shared)}: is used outside of the block too"
        return ""

    def _tensors(self, modules: Sequence[str]) -> list[str]:
        """Return the names of the parameters in some modules, and of the buffers that are saved with them."""
        unsaved: set[int] = set()
        for module in submodules(self.forward.submodule):
            for name in module._non_persistent_buffers_set:
                unsaved.add(id(module._buffers[name]))
        names = []
        for name, tensor in self.forward.tensors.items():
            if not tensor.is_floating_point() or id(tensor) in unsaved:
                continue
            module_name = module_of(name)
            if self.forward.shapes[name] and _is_in(module_name, modules):
                names.append(name)
        return names

    def _group(self, name: str, modules: Sequence[str], last: str) -> Group:
        """Return the group of one channel that is a block."""
        made: list[Slice] = []
        others: list[Slice] = []
        for tensor in self._tensors(modules):
            size = self.forward.shapes[tensor][0]
            whole = Slice(
                tensor,
                axis=0,
                step=size,
                width=size,
            )
            is_parameter = isinstance(self.forward.tensors[tensor], nn.Parameter)
            if is_parameter and module_of(tensor) == last:
                made.append(whole)
            else:
                others.append(whole)
        return Group(
            name=name,
            size=1,
            out_slices=tuple(made),
            in_slices=tuple(made),
            other_slices=tuple(others),
            least=0,
            kind="blocks",
        )

    def _absences(self, block: str, modules: Sequence[str]) -> dict[str, Absence]:
        """Return what modules return once their block is pruned, of those that return what can be made anew."""
        found = {}
        for name in modules:
            calls = []
            for sheet in self.fitting.sheets:
                call = sheet.record.module_calls.get(CallKey(name, 0))
                if call is not None:
                    calls.append(call)
            if len(calls) == len(self.fitting.sheets):
                absence = self._absence(block, calls)
                if absence is not None:
                    found[name] = absence
        return found

    def _absence(self, block: str, calls: Sequence[ModuleCall]) -> Absence | None:
        """Return what a module returns, None where that is not known.

        Args:
            block: The name of its block.
            calls: The call of it, as every sheet has it.
        """
        given = [_first_tensor(call.inputs) for call in calls]
        outputs = [call.output for call in calls]
        is_single = isinstance(outputs[0], Tensor)
        is_known = isinstance(outputs[0], Tensor | tuple)
        if given[0] is None or not is_known:
            return None
        if is_single:
            outputs = [(output,) for output in outputs]
        places = zip(*outputs, strict=True)
        lengths = [self._lengths(given, made) for made in places]
        if not lengths or () in lengths:
            return None
        return Absence(block, tuple(lengths), is_single)

    def _lengths(self, given: Sequence[Any], made: Sequence[Any]) -> tuple[Count | None, ...] | None:
        """Return the lengths of the axes of what is returned, by what is given; nothing where they are not known.

        Args:
            given: The first tensor that a module is given, as every sheet has it.
            made: What it returns in one place, as every sheet has it.
        """
        if all(one is None for one in made):
            return None
        if not all(isinstance(one, Tensor) and one.dim() for one in made):
            return ()
        lengths: list[Count | None] = []
        for axis in range(made[0].dim()):
            count = self._count(made, axis)
            if count is None:
                return ()
            is_same = axis < given[0].dim() and self._count(given, axis) == count
            if is_same:
                lengths.append(None)
            elif axis or count.groups:
                lengths.append(count)
            else:  # the number of samples, which may be any other
                return ()
        return tuple(lengths)

    def _count(self, tensors: Sequence[Any], axis: int) -> Count | None:
        along = [Tracer.labels(tensor, axis) for tensor in tensors]
        return self.fitting.count(along, tensors[0].shape[axis])


def _is_in(name: str, modules: Any) -> bool:
    """Tell whether a module is one of some, or in one of them."""
    inside = f"{name}."
    return any(inside.startswith(f"{module}.") for module in modules)


def _overlap(name: str, modules: Sequence[str]) -> bool:
    """Tell whether a module is in one of some, or one of them in it."""
    return _is_in(name, modules) or any(_is_in(module, [name]) for module in modules)


def _first_tensor(inputs: Any) -> Tensor | None:
    return next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)


def find_blocks(
    forward: Forward,
    flow: Flow,
    fitting: Fitting,
    kept: Sequence[str],
) -> tuple[list[Block], dict[str, str]]:
    """Find the residual blocks of a network that can be pruned.

    Args:
        forward: The forward pass.
        flow: A tracer that has not followed it yet.
        fitting: Finds out which sizes follow channels.
        kept: Names of modules that have to stay.

    Returns:
        The blocks, and why others cannot be pruned, by name.
    """
    forward.run(flow, ALL_KEPT, training=False)
    finding = _Finding(forward, flow, fitting, kept)
    return list(finding.blocks()), finding.refused
