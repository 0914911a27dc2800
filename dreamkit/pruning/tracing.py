"""Following channels through a model: which of them every layer reads and makes.

One image goes through the model. Beside every activation goes a tensor of its shape that tells, for
each element, the channel it belongs to. What moves elements about (views, concatenations, shuffles)
moves these numbers the same way; where two channels meet in a sum or a product, they become one,
since none can go without the other. What becomes of them in a layer or an operation tells a rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dreamkit.errors import PluginError
from dreamkit.model_state import device_of, eval_mode
from dreamkit.pruning.channels import Place, Trace, TraceFailed, any_channels, distinct
from dreamkit.pruning.layer_rules import BUILT_IN, built_in_rule
from dreamkit.pruning.op_rules import follow_operation
from dreamkit.pruning.outputs import tensors_in
from dreamkit.pruning.rules import Call
from dreamkit.types import ChannelRule

_TIMES = (1, 2, 4)
"""Larger images that a head for training may need: its pools are made for the full size."""


def trace(
    model: nn.Module,
    input_size: tuple[int, int, int],
    rules: Sequence[ChannelRule] = (),
    training_size: tuple[int, int, int] | Literal["found"] | None = "found",
) -> Trace:
    """Follow channels through a model, which stays as it is.

    Layers that a run in eval mode does not call, as heads for training alone, are looked for by a
    run as in training, all of whose layers stay in eval mode: no statistics change.

    Args:
        model: run in eval mode and, if need be, as in training.
        input_size: (channels, height, width).
        rules: of layers and operations beside those that are known; they come first.
        training_size: images of the run as in training; ``found`` for the smallest of this size
            and its multiples that it takes, where there are layers to look for; None for no such
            run.

    Raises:
        TraceFailed: the model raises something.
        PluginError: one of the rules fails.
    """
    tracer = _Tracer(model, rules)
    tracer.run(input_size, training=False)
    found = tracer.trace
    if training_size == "found":
        if tracer.uncalled():
            channels, height, width = input_size
            for times in _TIMES:
                size = (channels, times * height, times * width)
                with contextlib.suppress(TraceFailed):
                    tracer.run_as_in_training(size)
                    break
    elif training_size is not None:
        tracer.run_as_in_training(training_size)
    return found


class _Tracer(TorchDispatchMode):
    """Sees every operation that no layer stands for, and every layer."""

    def __init__(self, model: nn.Module, rules: Sequence[ChannelRule]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        # PyTorch's own come last: a rule may be for one of their subclasses.
        self.rules = [rule for rule in rules if type(rule) not in map(type, BUILT_IN)]
        self.trace = Trace()
        self.inside = 0
        self.following = False
        self.under_way: list[tuple[str, nn.Module]] = []
        self.entered: list[tuple[str, Any]] = []
        self.failed: Any = None
        self.known: dict[int, Tensor] = {}
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.called: set[str] = set()
        # The tensors themselves, too: a scripted module makes new ones of Python's each time.
        self.scripted = {
            id(tensor): (name, tensor)
            for name, module in model.named_modules()
            if isinstance(module, torch.jit.ScriptModule)
            for tensor in (*module.parameters(), *module.buffers())
        }

    def run(self, input_size: tuple[int, int, int], training: bool) -> None:
        """Follow channels through one run.

        Args:
            input_size: (channels, height, width).
            training: as in training, but for the layers themselves.

        Raises:
            TraceFailed: the model raises something.
            PluginError: one of the rules fails.
        """
        self.inside, self.following, self.failed = 0, False, None
        self.under_way, self.entered = [], []
        example = torch.zeros(1, *input_size, device=device_of(self.model))
        try:
            with torch.no_grad(), eval_mode(self.model), self.hooked():
                if training:
                    for module in self.model.modules():
                        module.training = next(module.children(), None) is not None
                with self:
                    outputs = self.model(example)
        except PluginError:
            raise
        except Exception as error:  # the model is anyone's code
            raise TraceFailed(self.trace, self._places()) from error
        for output in tensors_in(outputs, set()):
            labels = self.labels(output)
            self.trace.block(labels, "makes the model's outputs")
            self.trace.outputs = self.trace.outputs or labels.reshape(-1).tolist()

    def run_as_in_training(self, input_size: tuple[int, int, int]) -> None:
        """Follow channels through a second run, to layers that only training calls.

        Raises:
            TraceFailed: the model raises something.
            PluginError: one of the rules fails.
        """
        earlier = list(self.trace.uses.values())
        self.run(input_size, training=True)
        self.trace.training_size = input_size
        before = {self.trace.find(label) for use in earlier for label in use.labels}
        for use in self.trace.uses.values():
            # No image that a student is judged by tells what these are worth.
            new = [label for label in use.labels if self.trace.find(label) not in before]
            self.trace.block(new, "only training runs what makes them")

    def uncalled(self) -> bool:
        """Whether there are layers with channels that no run has called."""
        return any(
            name not in self.called
            and built_in_rule(module) is not None
            and next(module.parameters(), None) is not None
            for name, module in self.model.named_modules()
        )

    def _places(self) -> list[Place]:
        places = [] if self.failed is None else [Place(self._channels_in(self.failed))]
        return [*places, *(Place(self._channels_in(x), name) for name, x in reversed(self.entered))]

    def _channels_in(self, given: Any) -> list[int]:
        found: set[int] = set()
        for value in tree_flatten(given)[0]:
            if isinstance(value, Tensor):
                found.update(distinct(self.labels(value))[0].unique().tolist())
        return sorted(found)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow every layer's calls."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # it takes no hooks, nor do its parts
                enter, leave = self._hooks(name, module)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(handle.remove)
                handle = module.register_forward_hook(leave, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Any]:
        rule = self._added_rule(module) or built_in_rule(module)

        def enter(module: nn.Module, inputs: Any, named: Any) -> None:
            self.called.add(name)
            self.entered.append((name, (inputs, named)))
            if rule is not None:
                self.inside += 1
            elif not self.inside:
                self.under_way.append((name, module))

        def leave(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            self.entered.pop()
            if rule is None:
                if not self.inside:
                    self.under_way.pop()
            elif self.inside > 1:
                self.inside -= 1
            else:  # what the rule itself does is no part of the model
                self.following = True
                self._follow(rule, name, module, inputs, named, output)
                self.following = False
                self.inside -= 1

        return enter, leave

    def _added_rule(self, target: Any) -> ChannelRule | None:
        """Return the rule of a layer or an operation among those that were added."""
        for rule in self.rules:
            for known in rule.targets:
                if isinstance(target, known) if isinstance(known, type) else target is known:
                    return rule
        return None

    # --- labels -------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Tensor:
        """Return the channel of every element."""
        known = self.known.get(id(tensor), getattr(tensor, "_channels", None))
        if known is not None:
            found: Tensor = known
            return found
        found = torch.zeros((), dtype=torch.int64).expand(tensor.shape)
        wide = [axis for axis, size in enumerate(tensor.shape) if size > 1]
        if id(tensor) in self.parameters and len(wide) == 1:
            # A scale or a shift outside any layer: it goes with the channels that it meets.
            name, count = self.parameters[id(tensor)], tensor.shape[wide[0]]
            found = torch.tensor(self.trace.fresh(count)).view(tensor.shape)
            self.trace.record(name, "parameter", found.reshape(-1).tolist(), {name: wide[0]})
            self.known[id(tensor)] = found  # not on the tensor, which outlives the trace
        return found

    def _labels_of(self, value: Any) -> Any:
        return self.labels(value) if isinstance(value, Tensor) else value

    # --- calls --------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.following:
            return func(*args, **kwargs)
        try:
            outputs = func(*args, **kwargs)
        except Exception:
            self.failed = (args, kwargs)
            raise
        self.failed = None  # the model's code may have caught an earlier one
        if not self.inside:
            given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            scripted = [self.scripted[id(t)][0] for t in given if id(t) in self.scripted]
            if scripted:
                for tensor in given:
                    reason = f"{scripted[-1]} is TorchScript, which cannot be cut"
                    self.trace.block(self.labels(tensor), reason)
            elif any(any_channels(self.labels(t)) for t in given):
                rule = self._added_rule(func.overloadpacket)
                self._follow(rule, str(func.overloadpacket), func, args, kwargs, outputs)
        return outputs

    def _follow(
        self, rule: ChannelRule | None, name: str, target: Any, args: Any, kwargs: Any, outputs: Any
    ) -> None:
        """Find what becomes of channels in a call; without a rule it is a known operation's."""
        args, kwargs = tree_map(self._labels_of, (tuple(args), dict(kwargs)))
        caller = self.under_way[-1] if self.under_way else None
        call = Call(self.trace, name, target, args, kwargs, outputs, caller)
        if rule is None:
            found = follow_operation(call)
        elif rule in self.rules:
            found = _checked(rule, call)
        else:
            found = rule.follow(call)
        several = [found] if found is None or isinstance(found, Tensor) else found
        for output, labels in zip(tree_flatten(outputs)[0], several, strict=False):
            if isinstance(output, Tensor) and labels is not None:
                output._channels = labels  # type: ignore[attr-defined]


def _checked(rule: ChannelRule, call: Call) -> Sequence[Tensor | None]:
    """Return what a rule of others answers, which is to fit the outputs.

    Raises:
        PluginError: it does not, or the rule fails.
    """
    where = f"the channel rule {type(rule).__name__} of {call.name}"
    try:
        answer = rule.follow(call)
    except Exception as error:  # the rule is anyone's code
        raise PluginError(f"{where} failed: {type(error).__name__}: {error}") from error
    if answer is None:
        for channels in call.channels:
            call.fix(channels, f"{call.name} does not follow them")
        return [None]
    found: list[Tensor | None] = [answer] if isinstance(answer, Tensor) else list(answer)
    for output, labels in zip(tree_flatten(call.output)[0], found, strict=False):
        if labels is not None and (labels.shape != output.shape or labels.dtype != torch.int64):
            raise PluginError(
                f"{where} answers {labels.dtype} {tuple(labels.shape)} for an output of the "
                f"shape {tuple(output.shape)}: give int64 of the same shape"
            )
    return found
