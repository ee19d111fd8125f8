"""Forward all rows, later run the backward of some of them, without a second forward.

Training on a part of the rows that were scored usually forwards that part again with gradient. A per-sample module (no
BatchNorm) needs no second forward. `RowReuse.forward_all` keeps what autograd saves, and `Kept.rows` gathers it for the
chosen rows, whose backward then gives the gradients of an ordinary forward and backward on these rows:

    reuse = RowReuse(encoder)
    features, kept = reuse.forward_all(images)  # [N, D], without gradient
    loss_of(kept.rows(hardest)).backward()  # [M, D] -> gradients of the encoder's parameters

AOTAutograd traces forward and backward as one graph of aten operators, once for each signature of the inputs. It is traced
with two numbers of rows, on tensors without content: a number that differs between the two graphs is a multiple of the
number of rows, and every other number is a constant. So the graph holds for any number of rows.

Legend: N rows forwarded, M rows chosen, D features.
"""

import contextlib
import logging
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from hvp_ray.errors import RowReuseError, first_line

logger = logging.getLogger(__name__)

_FEW, _MORE = 2, 3
"""Numbers of rows that are traced: the smallest that torch does not treat specially."""


class RowReuse:
    """Forwards all rows of a per-sample module, so that the backward can run on some of them.

    Parameters and buffers are read when rows are forwarded. Other attributes (a drop path's rate) are part of the trace.
    """

    def __init__(self, module: nn.Module, *, keep_inputs_of: Iterable[nn.Module] = (), compiled: bool = False) -> None:
        """Prepare a module; nothing is traced yet.

        Args:
            module: its inputs are tensors whose first dimension is the rows, and its result is one such tensor.
            keep_inputs_of: submodules (a transformer's blocks) of which only the input is kept. The backward computes the
                rest again for the chosen rows, as activation checkpointing does. None: all that the backward needs is kept.
            compiled: compile both halves by torch.compile, once for each number of rows. Results differ in rounding, and
                dropout and drop path draw other numbers.

        Raises:
            RowReuseError: the module has BatchNorm in training mode.
        """
        for name, layer in module.named_modules():
            if isinstance(layer, _BatchNorm) and layer.training:
                raise RowReuseError(
                    f"{name or 'the module'} is a BatchNorm, so the result of a row depends on the other rows. Forward the "
                    f"chosen rows again, or use an encoder without BatchNorm (a Vision Transformer)"
                )
        self._module = module
        self._blocks = tuple(keep_inputs_of)
        self._compiled = compiled
        self._splits: dict[Any, _Split | None] = {}
        # Not as a decorator, because it imports Dynamo, which takes seconds.
        self._forward = torch.compiler.disable(RowReuse._forward_all, reason="the halves are compiled by themselves")

    def forward_all(self, *inputs: Tensor | None) -> tuple[Tensor, "Kept"]:
        """Return the outputs of all rows without gradient, and what the backward of any of them needs.

        Dropout and drop path draw here, for all rows, as an ordinary forward of all rows would.

        Args:
            inputs: arguments of the module; tensors with N rows, or None.

        Raises:
            RowReuseError: the result of a row depends on the other rows.
        """
        return self._forward(self, *inputs)

    @torch.no_grad()
    def _forward_all(self, *inputs: Tensor | None) -> tuple[Tensor, "Kept"]:
        states = _states_of(self._module)
        rows = next(value.shape[0] for value in inputs if value is not None)
        split = self._split_of(states, inputs)
        if split is None:
            outputs = self._module(*inputs)
            return outputs, _KeptInputs(self._module, inputs, outputs.device)
        given = [value for value in inputs if value is not None]
        with torch.autocast(given[0].device.type, enabled=False):  # the casts are in the graph
            outputs, *values = split.forward(rows, compiled=self._compiled)(*states, *given)
        return outputs, _KeptValues(split, states, values, outputs, rows, compiled=self._compiled)

    def _split_of(self, states: list[Tensor], inputs: tuple[Tensor | None, ...]) -> "_Split | None":
        """Return the traced halves for these inputs; None: they cannot be traced."""
        signature = self._signature(states, inputs)
        if signature not in self._splits:
            try:
                split = _trace(self._module, self._blocks, states, inputs)
                if not isinstance(states[0], FakeTensor):  # an imaginary step has no values to check
                    _check_against_autograd(split, self._module, states, inputs)
                self._splits[signature] = split
            except RowReuseError:
                raise
            except Exception as error:  # noqa: BLE001 (torch raises all kinds while it traces)
                if None not in self._splits.values():
                    logger.warning(
                        "rows are forwarded again instead of reused: %s cannot be traced: %s",
                        type(self._module).__name__,
                        first_line(error),
                    )
                self._splits[signature] = None
        return self._splits[signature]

    def _signature(self, states: list[Tensor], inputs: tuple[Tensor | None, ...]) -> Any:
        """Return what a trace depends on."""
        device = states[0].device.type
        of_inputs = [
            None if value is None else (value.shape[1:], value.dtype, value.device, _order_in_memory(value))
            for value in inputs
        ]
        return (
            tuple(of_inputs),
            tuple((state.dtype, state.device, state.requires_grad) for state in states),
            tuple(layer.training for layer in self._module.modules()),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )


class Kept:
    """What the backward of all rows needs, until some rows are chosen."""

    def rows(self, indices: Int64[Tensor, " chosen"]) -> Tensor:
        """Return the outputs of some rows, differentiable with respect to the module's parameters.

        What was kept of the other rows is freed, so this can be called once. The parameters must not change before the
        backward.

        Raises:
            RowReuseError: rows were chosen before.
        """
        raise NotImplementedError


class _KeptValues(Kept):
    def __init__(
        self,
        split: "_Split",
        states: list[Tensor],
        values: list[Tensor],
        outputs: Tensor,
        num_rows: int,
        *,
        compiled: bool = False,
    ) -> None:
        self._split, self._states, self._num_rows, self._compiled = split, states, num_rows, compiled
        self._versions = [state._version for state in states]
        self._values: list[Tensor] | None = values
        self._outputs: Tensor | None = outputs

    def rows(self, indices: Int64[Tensor, " chosen"]) -> Tensor:
        """See `Kept.rows`."""
        values, outputs = self._values, self._outputs
        if values is None or outputs is None:
            raise RowReuseError("rows were chosen before, and what was kept is freed; call forward_all again")
        self._values = self._outputs = None
        chosen: list[Tensor] = []
        with torch.no_grad():
            outputs = outputs.index_select(0, indices)
            for of_rows in reversed(self._split.has_rows):
                value = values.pop()
                chosen.append(_gather(value, indices, self._num_rows) if of_rows else value)
                del value  # of all rows: freed before the next is gathered
        backward = self._split.backward(len(indices), compiled=self._compiled)
        given = _ChosenRows(self._split, backward, chosen, self._states, self._versions)
        return _Backward.apply(given, outputs, *self._states)


class _KeptInputs(Kept):
    """Of a module that cannot be traced: the chosen rows are forwarded again."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor | None, ...], device: torch.device) -> None:
        self._module, self._inputs, self._device = module, inputs, device.type
        self._precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None

    def rows(self, indices: Int64[Tensor, " chosen"]) -> Tensor:
        """See `Kept.rows`."""
        chosen = [None if value is None else value.index_select(0, indices) for value in self._inputs]
        with torch.autocast(self._device, dtype=self._precision, enabled=self._precision is not None):
            outputs: Tensor = self._module(*chosen)
        return outputs


def _gather(value: Tensor, indices: Tensor, num_rows: int) -> Tensor:
    """Return the chosen rows of a tensor whose first dimension is rows, or rows times something; strides keep their order."""
    if value.stride(0) == 0 and value.shape[0] == num_rows:
        return value[:1].expand(len(indices), *value.shape[1:])  # all rows are equal
    by_row = value.unflatten(0, (num_rows, -1))
    order = _order_in_memory(by_row)
    gathered = by_row.permute(order).index_select(order.index(0), indices)
    return gathered.permute([order.index(dim) for dim in range(by_row.dim())]).flatten(0, 1)


@dataclass(slots=True)
class _ChosenRows:
    """What the backward of the chosen rows needs."""

    split: "_Split"
    backward: Callable[[list[Tensor]], tuple[Tensor | None, ...]]
    """See `_Split.backward`."""
    values: list[Tensor]
    """In reverse order; the backward empties it."""
    states: list[Tensor]
    """Parameters and buffers."""
    versions: list[int]
    """Of the states when all rows were forwarded; torch counts changes in place."""


class _Backward(torch.autograd.Function):
    """Connects the outputs of the chosen rows with the parameters."""

    @staticmethod
    def forward(ctx: Any, chosen: _ChosenRows, outputs: Tensor, *states: Tensor) -> Tensor:
        ctx.chosen = chosen
        return outputs

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        chosen: _ChosenRows | None = ctx.chosen
        if chosen is None:
            raise RowReuseError("this backward ran before and has freed what it needs; call forward_all again")
        ctx.chosen = None
        if any(state._version != version for state, version in zip(chosen.states, chosen.versions, strict=True)):
            raise RowReuseError("the parameters changed between the forward and the backward; run the backward first")
        split = chosen.split
        box = [tangent.contiguous(), *chosen.values, *(chosen.states[i] for i in reversed(split.states_of_backward))]
        chosen.values = []
        return None, None, *chosen.backward(box)


def _states_of(module: nn.Module) -> list[Tensor]:
    """Return parameters and buffers, in a fixed order."""
    return [*module.parameters(), *module.buffers()]


def _call_with(module: nn.Module, states: Iterable[Tensor], inputs: tuple[Tensor | None, ...]) -> Tensor:
    """Forward with other parameters and buffers."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    outputs: Tensor = torch.func.functional_call(module, dict(zip(names, states, strict=True)), inputs)
    return outputs


_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.t.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
}
"""Operators whose result is all of their input's memory."""
_SPLITS = {torch.ops.aten.unbind.int, torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default}
"""Operators whose results together are their input's memory."""


@dataclass(frozen=True, slots=True)
class _PerRow:
    """A number in a graph: this many for each row."""

    number: int


class _Joint:
    """Forward and backward in one graph, for any number of rows."""

    def __init__(self, few: fx.GraphModule, more: fx.GraphModule) -> None:
        """Compare the graphs of `_FEW` and `_MORE` rows.

        Raises:
            RowReuseError: they differ in more than multiples of the number of rows.
        """
        self._module = few
        self.nodes = list(few.graph.nodes)
        of_more = list(more.graph.nodes)
        if [(node.op, node.target) for node in self.nodes] != [(node.op, node.target) for node in of_more]:
            raise RowReuseError("the operators of the module depend on the number of rows, so rows cannot be reused")
        self._twins = dict(zip(self.nodes, of_more, strict=True))
        self._arguments = {node: self._scalable(node, twin) for node, twin in self._twins.items()}

    @staticmethod
    def _scalable(node: fx.Node, twin: fx.Node) -> tuple[list[Any], Any]:
        """Return the leaves of a node's arguments, with `_PerRow` for numbers that grow with the rows, and their tree."""
        leaves, tree = tree_flatten((node.args, node.kwargs))
        of_twin, _ = tree_flatten((twin.args, twin.kwargs))
        scalable = []
        for value, other in zip(leaves, of_twin, strict=True):
            if value == other or (isinstance(value, fx.Node) and value.name == other.name):
                scalable.append(value)
            elif isinstance(value, int) and value * _MORE == other * _FEW:
                scalable.append(_PerRow(value // _FEW))
            else:
                raise RowReuseError(
                    f"the operator {node.target} is given {value} for {_FEW} rows and {other} for {_MORE}, which is no "
                    f"multiple of the number of rows, so rows cannot be reused"
                )
        return scalable, tree

    def has_rows(self, node: fx.Node) -> bool:
        """Tell whether the first dimension of a node's value is rows, or a multiple of the rows.

        Raises:
            RowReuseError: another dimension grows with the rows.
        """
        few, more = node.meta["val"].shape, self._twins[node].meta["val"].shape
        if few == more:
            return False
        if few[0] * _MORE != more[0] * _FEW or few[1:] != more[1:]:
            raise RowReuseError(
                f"{node.name} has the shape {tuple(few)} for {_FEW} rows and {tuple(more)} for {_MORE}; only the first "
                f"dimension may grow with the rows. The module mixes rows, so forward the chosen rows again"
            )
        return True

    def extract(
        self, inputs: list[fx.Node], outputs: list[fx.Node | None], rows: int, *, boxed: bool
    ) -> fx.GraphModule:
        """Return the part of the graph between some nodes, for a number of rows.

        Args:
            inputs: nodes whose values are given.
            outputs: nodes whose values are returned; None stays None.
            rows: number of rows.
            boxed: the part takes one list of the inputs in reverse order and empties it, so that each value is freed
                after its last use.
        """
        graph = fx.Graph()
        if boxed:
            box = graph.placeholder("box")
            new = {node: graph.call_function(_take, (box,)) for node in inputs}
        else:
            new = {node: graph.placeholder(node.name) for node in inputs}
        needed = _ancestors((node for node in outputs if node is not None), stop=set(inputs))
        for node in self.nodes:
            if node in needed and node not in new:
                leaves, tree = self._arguments[node]
                scaled = [leaf.number * rows if isinstance(leaf, _PerRow) else leaf for leaf in leaves]
                arguments, options = tree_unflatten(
                    [new.get(s, s) if isinstance(s, fx.Node) else s for s in scaled], tree
                )
                new[node] = graph.create_node(node.op, node.target, tuple(arguments), options)
        graph.output(tuple(None if node is None else new[node] for node in outputs))
        return fx.GraphModule(self._module, graph)


def _take(box: list[Tensor]) -> Tensor:
    return box.pop()


def _compile(graph: fx.GraphModule) -> Callable[..., Any]:
    """Compile for these shapes only: steps of a run have the same numbers of rows."""
    compiled: Callable[..., Any] = torch.compile(graph, fullgraph=True, dynamic=False)
    return compiled


def _unboxed(compute: Callable[..., Any]) -> Callable[[list[Tensor]], Any]:
    return lambda box: compute(*reversed(box))


def _ancestors(nodes: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all that they are computed from, up to `stop`."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                waiting += node.all_input_nodes
    return found


class _Split:
    """The two halves of a joint graph: the forward returns what the backward needs."""

    def __init__(self, joint: _Joint, num_states: int) -> None:
        self._joint = joint
        placeholders = [node for node in joint.nodes if node.op == "placeholder"]
        self._inputs, tangent = placeholders[:-1], placeholders[-1]
        self._outputs, *self._gradients = joint.nodes[-1].args[0]
        del self._gradients[num_states:]  # of the inputs
        if not joint.has_rows(self._outputs):
            raise RowReuseError("the module's result has no rows in its first dimension, so rows cannot be reused")
        states = self._inputs[:num_states]
        self._values = self._choose_values(set(states))
        self.has_rows = [joint.has_rows(node) for node in self._values]
        """Of each kept value."""
        needed = self._needed_by_backward({*self._values, *states})
        self.states_of_backward = [i for i, node in enumerate(states) if node in needed]
        """Indices of the parameters and buffers that the backward reads."""
        self._of_backward = [*(states[i] for i in self.states_of_backward), *self._values, tangent]
        self._forwards: dict[tuple[int, bool], Callable[..., Any]] = {}
        self._backwards: dict[tuple[int, bool], Callable[..., Any]] = {}

    def forward(self, rows: int, *, compiled: bool = False) -> Callable[..., Any]:
        """Return (states, inputs) -> (outputs, values)."""
        if (rows, compiled) not in self._forwards:
            graph = self._joint.extract(self._inputs, [self._outputs, *self._values], rows, boxed=False)
            self._forwards[rows, compiled] = _compile(graph) if compiled else graph
        return self._forwards[rows, compiled]

    def backward(self, rows: int, *, compiled: bool = False) -> Callable[[list[Tensor]], Any]:
        """Return [tangent, values reversed, states reversed] -> gradients of all states."""
        if (rows, compiled) not in self._backwards:
            graph = self._joint.extract(self._of_backward, self._gradients, rows, boxed=not compiled)
            self._backwards[rows, compiled] = _unboxed(_compile(graph)) if compiled else graph
        return self._backwards[rows, compiled]

    def _choose_values(self, states: set[fx.Node]) -> list[fx.Node]:
        """Return the nodes of the forward whose values are kept for the backward.

        The backward makes views again from what they view, and computes cheap values again.
        """
        forward = _ancestors([self._outputs], stop=set()) | set(self._inputs)
        forward |= {node for node in self._joint.nodes if node.target is operator.getitem and node.args[0] in forward}
        used = self._needed_by_backward(forward) & forward
        kept = {_base_of(node, used) for node in used} - states
        for node in self._joint.nodes:  # in order: what is recomputed depends on what is kept before it
            if node in kept and self._joint.has_rows(node) and _is_cheap(node, kept | states):
                kept.remove(node)
        boundaries = {node for node in self._joint.nodes if node.target is _BOUNDARY}
        if boundaries:
            ends = [node for node in boundaries if node.args[1] == "end"]
            inside = set().union(*(_ancestors([end], stop=boundaries - {end}) for end in ends)) - set(self._inputs)
            drawn = {node for node in inside if _is_random(node)}
            kept = (kept - inside) | boundaries | {value for node in drawn for value in _values_of(node)}
            kept &= self._needed_by_backward(kept | states)
        return [node for node in self._joint.nodes if node in kept]

    def _needed_by_backward(self, given: set[fx.Node]) -> set[fx.Node]:
        """Return the nodes that the gradients are computed from, up to those that are given."""
        return _ancestors((node for node in self._gradients if node is not None), stop=given)


@torch.library.custom_op("hvp_ray::boundary", mutates_args=())
def _boundary(value: Tensor, place: str) -> Tensor:  # noqa: ARG001 (read from the graph)
    """Mark the input ("start") or the output ("end") of a block in a graph; return its values."""
    return value.clone()


_boundary.register_fake(lambda value, _place: torch.empty_like(value))
_boundary.register_autograd(lambda _ctx, tangent: (tangent, None))
_BOUNDARY = torch.ops.hvp_ray.boundary.default


@contextlib.contextmanager
def _marked(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Mark the first input and the output of every block while it is traced."""
    hooks = []
    for block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda _, inputs: (_boundary(inputs[0], "start"), *inputs[1:])))
        hooks.append(block.register_forward_hook(lambda _, _inputs, output: _boundary(output, "end")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_random(node: fx.Node) -> bool:
    """Tell whether a node draws random numbers, which the backward must not draw again."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    if "dropout_p" not in names:
        return True
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return bool(given.get("dropout_p"))


def _values_of(node: fx.Node) -> list[fx.Node]:
    """Return the nodes of an operator's results."""
    results = [user for user in node.users if user.target is operator.getitem]
    return results or [node]


_CHEAP = {
    torch.ops.aten.gelu.default,
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten._to_copy.default,
}
"""Operators that the backward computes again for the chosen rows, if their inputs are kept: as fast as gathering."""


def _is_cheap(node: fx.Node, kept: set[fx.Node]) -> bool:
    """Tell whether cheap operators alone give the value of a node from values that are kept."""
    cheap = node.target is operator.getitem or node.target in _VIEWS | _CHEAP
    return cheap and all(source in kept or _is_cheap(source, kept) for source in node.all_input_nodes)


def _base_of(node: fx.Node, used: set[fx.Node]) -> fx.Node:
    """Return the node whose value a view views, if the view is all of it."""
    while True:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return node
        if node.target in _VIEWS:
            node = source
        elif node.target is operator.getitem and source.target in _SPLITS and used.issuperset(source.users):
            node = source.args[0]  # type: ignore[assignment]
        else:
            return node


def _trace(
    module: nn.Module, blocks: tuple[nn.Module, ...], states: list[Tensor], inputs: tuple[Tensor | None, ...]
) -> _Split:
    """Trace forward and backward.

    Raises:
        RowReuseError: the module mixes rows.
        Exception: of any kind, if torch cannot trace the module.
    """
    from torch._functorch import config as functorch_config  # takes seconds: Dynamo and Inductor
    from torch._functorch.aot_autograd import aot_export_joint_simple

    def compute(*flat: Tensor) -> tuple[Tensor]:
        given = iter(flat[len(states) :])
        with _marked(blocks):
            outputs = _call_with(module, flat[: len(states)], tuple(None if i is None else next(given) for i in inputs))
        if not isinstance(outputs, Tensor):
            raise RowReuseError(
                f"the module returns a {type(outputs).__name__}, and rows are reused of one tensor only"
            )
        return (outputs.clone() if outputs._is_view() else outputs,)  # the tracer allows no views

    def joint_graph(rows: int) -> fx.GraphModule:
        made = [_without_content(state, state.shape).requires_grad_(state.requires_grad) for state in states]
        made += [_without_content(value, (rows, *value.shape[1:])) for value in inputs if value is not None]
        joint = aot_export_joint_simple(compute, tuple(made), trace_joint=True)
        assert isinstance(joint, fx.GraphModule)
        return joint

    # Counters of operations and memory that are active must not see the trace. Autograd runs its backward outside autocast.
    with (
        _disable_current_modes(),
        FakeTensorMode(),
        torch.enable_grad(),
        functorch_config.patch(backward_pass_autocast="off"),
    ):
        return _Split(_Joint(joint_graph(_FEW), joint_graph(_MORE)), len(states))


def _without_content(like: Tensor, shape: Iterable[int]) -> Tensor:
    """Return a tensor without content, with the dtype, device and order in memory of another."""
    return torch.empty_permuted(tuple(shape), _order_in_memory(like), dtype=like.dtype, device=like.device)


def _order_in_memory(value: Tensor) -> tuple[int, ...]:
    """Return the dimensions from the outermost in memory to the innermost."""
    return tuple(sorted(range(value.dim()), key=value.stride, reverse=True))


def _check_against_autograd(
    split: _Split, module: nn.Module, states: list[Tensor], inputs: tuple[Tensor | None, ...]
) -> None:
    """Compare the backward of two of three rows with autograd's, of all three rows and no gradient for the other row.

    Both draw the same numbers (drop path). A module that mixes rows, or whose rows are not outermost in memory, differs.

    Raises:
        RowReuseError: they differ.
    """
    given = [value for value in inputs if value is not None]
    first = torch.arange(_MORE, device=given[0].device) % given[0].shape[0]
    few = [None if value is None else value[first] for value in inputs]
    chosen = torch.tensor([2, 0], device=given[0].device)
    devices = [given[0].device] if given[0].is_cuda else []
    trained = [state for state in states if state.requires_grad]
    with _disable_current_modes(), torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(0)
        ordinary = module(*few)
        tangents = torch.zeros_like(ordinary)
        tangents[chosen] = torch.randn_like(ordinary[chosen])
        expected = torch.autograd.grad(ordinary, trained, tangents, allow_unused=True)
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast(given[0].device.type, enabled=False):
            outputs, *values = split.forward(_MORE)(*states, *(value for value in few if value is not None))
        reused = _KeptValues(split, states, values, outputs, _MORE).rows(chosen)
        found = torch.autograd.grad(reused, trained, tangents[chosen], allow_unused=True)
    pairs = [(reused, ordinary[chosen]), *zip(found, expected, strict=True)]
    difference = sum(float((a - b).float().square().sum()) for a, b in pairs if a is not None and b is not None)
    size = sum(float(b.float().square().sum()) for _, b in pairs if b is not None)
    unequal_use = any((a is None) != (b is None) for a, b in pairs)
    is_float32 = ordinary.dtype == torch.float32 and not torch.is_autocast_enabled(ordinary.device.type)
    tolerance = 1e-3 if is_float32 else 5e-2
    if unequal_use or not difference <= tolerance**2 * size:
        raise RowReuseError(
            "the backward of some rows differs from autograd's, so the result of a row depends on the other rows; forward "
            "the chosen rows again, or use an encoder that treats each row by itself"
        )
