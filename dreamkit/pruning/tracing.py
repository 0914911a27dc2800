"""Following channels through a model: which of them every layer reads and makes.

One image goes through the model. Beside every activation goes a tensor of its shape that tells, for
each element, the channel it belongs to. What moves elements about (views, concatenations, shuffles)
moves these numbers the same way; where two channels meet in a sum or a product, they become one,
since none can go without the other. What becomes of them in a layer or an operation tells a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dreamkit.errors import PluginError
from dreamkit.model_state import device_of, eval_mode
from dreamkit.pruning.channels import NONE, Trace
from dreamkit.pruning.layer_rules import BUILT_IN, built_in_rule
from dreamkit.pruning.op_rules import follow_operation
from dreamkit.pruning.rules import Call
from dreamkit.types import ChannelRule


def trace(
    model: nn.Module, input_size: tuple[int, int, int], rules: Sequence[ChannelRule] = ()
) -> Trace:
    """Follow channels through a model, which stays as it is.

    Args:
        model: run once, in eval mode.
        input_size: (channels, height, width).
        rules: of layers and operations beside those that are known; they come first.

    Raises:
        PluginError: one of the rules fails.
    """
    tracer = _Tracer(model, rules)
    example = torch.zeros(1, *input_size, device=device_of(model))
    with torch.no_grad(), eval_mode(model), tracer.hooked(), tracer:
        outputs = model(example)
    for output in tree_flatten(outputs)[0]:
        if isinstance(output, Tensor):
            labels = tracer.labels(output)
            tracer.trace.block(labels, "makes the model's outputs")
            tracer.trace.outputs = tracer.trace.outputs or labels.reshape(-1).tolist()
    return tracer.trace


class _Tracer(TorchDispatchMode):
    """Sees every operation that no layer stands for, and every layer."""

    def __init__(self, model: nn.Module, rules: Sequence[ChannelRule]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        # PyTorch's own come last: a rule may be for one of their subclasses.
        self.rules = [rule for rule in rules if type(rule) not in map(type, BUILT_IN)]
        self.trace = Trace()
        self.inside = 0
        self.under_way: list[tuple[str, nn.Module]] = []
        self.known: dict[int, Tensor] = {}
        self.parameters = {id(p): name for name, p in model.named_parameters()}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow every layer's calls."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                enter, leave = self._hooks(name, module)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                handle = module.register_forward_hook(leave, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Any]:
        rule = self._added_rule(module) or built_in_rule(module)

        def enter(module: nn.Module, inputs: Any) -> None:
            if rule is not None:
                self.inside += 1
            elif not self.inside:
                self.under_way.append((name, module))

        def leave(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            if rule is None:
                if not self.inside:
                    self.under_way.pop()
            elif self.inside > 1:
                self.inside -= 1
            else:  # what the rule itself does is no part of the model
                self._follow(rule, name, module, inputs, named, output)
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
        found = torch.zeros(tensor.shape, dtype=torch.int64)
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
        outputs = func(*args, **kwargs)
        if not self.inside:
            given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            if any(bool((self.labels(t) != NONE).any()) for t in given):
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
