"""Observing an optimizer: hooks around every step that, once in an interval, compute statistics of the step.

    with watch(optimizer, SummaryWriter("runs/mine")):
        train()

The hooks only count the other steps. They are all that is added to the optimizer; copies and pickles of it have none.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from nfn_optim import pretrained
from nfn_optim.monitor.charts import QUANTITIES, layout_of, rule_name_of, tag, texts_of
from nfn_optim.monitor.grouping import WHOLE_NETWORK, Group, all_groups, parts_of
from nfn_optim.monitor.sampling import Sample
from nfn_optim.monitor.step_statistics import Snapshot, StepStatistics
from nfn_optim.monitor.writer import Array, ChartLayout, Writer
from nfn_optim.optimizer import NFNOptimizer

FINAL_QUANTITIES = ("update_over_weight", "gain", "cosine", "fallbacks")  # shown beside the hyperparameters
_LAYOUTS: WeakKeyDictionary[Any, ChartLayout] = WeakKeyDictionary()  # by writer: TensorBoard shows one layout per run


def watch(optimizer: torch.optim.Optimizer, writer: Any, every: int = 50, name: str = "optimizer") -> Observer:
    """Write statistics of an optimizer's updates to TensorBoard, for every layer.

    Args:
        optimizer: An `NFNOptimizer`, or a wrapper around one, such as accelerate's or Lightning's.
        writer: A `torch.utils.tensorboard.SummaryWriter`, or an object with its methods.
        every: Steps from one observation to the next; the first step is always observed.
        name: Beginning of its tags; optimizers that share a writer need different names.

    Returns:
        A handle: `close` it after training, or use it in a `with` statement.

    Raises:
        TypeError: It is another optimizer, or `writer` has no `add_scalar`.
        ValueError: `every` is less than 1, or the name is empty.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = NFNOptimizer(model)
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer, watch(optimizer, writer, every=10) as observer:
        ...     for _ in range(20):
        ...         model(torch.ones(1, 3)).sum().backward()
        ...         optimizer.step()
        >>> observer.step
        20
    """
    while not isinstance(optimizer, NFNOptimizer):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(
                f"expected an NFNOptimizer or a trainer's wrapper around one, found {type(optimizer).__name__}; "
                f"pass the optimizer itself"
            )
        optimizer = optimizer.optimizer
    if every < 1 or not name:
        raise ValueError(f"expected every >= 1 and a name, found every={every!r} and name={name!r}")
    return Observer(optimizer, Writer(writer), every, name)


class Observer:
    """The handle that `watch` returns.

    Args:
        optimizer: The optimizer.
        writer: Writes the statistics.
        every: Steps from one observation to the next.
        name: Beginning of the tags.

    Attributes:
        step: Steps of the optimizer so far, including skipped steps and those before `watch`.
        layout: The charts of the Custom Scalars page; merge them with your own for `writer.add_custom_scalars`.
    """

    def __init__(self, optimizer: NFNOptimizer, writer: Writer, every: int, name: str) -> None:
        self.every, self.name = every, name
        self.layout: ChartLayout = {}
        self._optimizer, self._writer = optimizer, writer
        self._observation: _Observation | None = None
        self._sample: Sample | None = None
        self._described: tuple[object, ...] = ()  # names and symmetry of the layout and text written last
        self._groups: dict[str, Group] = {}
        self._first_tensors: dict[str, str] = {}  # axis -> the first tensor with it
        self._membership: Array = np.zeros((0, 0))
        self._final: dict[str, float] = {}  # the latest values of the whole network
        self._observed_step, self._observed_time = 0, math.nan  # the last observation: its step, when it ended
        self._previous_step_end = math.nan  # when the step before the next observation ended
        self._count_steps(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._count_steps),
        ]

    # ----------------------------------------------------------------------------------------------------- the handle

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, **final: float) -> None:
        """Stop observing, and write the hyperparameters with the final values.

        Args:
            final: Results of the training by name, shown with them: `close(accuracy=0.9)`.
        """
        if self._handles:
            self.remove()
            values = {tag(self.name, "final", key): value for key, value in {**final, **self._final}.items()}
            self._writer.write_hparams(self._hparams(), values, self.step)
            self._writer.flush()

    def remove(self) -> None:
        """Stop observing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._observation = None

    # ------------------------------------------------------------------------------------------------------ the hooks

    def _count_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Continue the count from the steps in the state."""
        assert isinstance(optimizer, NFNOptimizer)
        steps = [int(s["step"].max()) for s in optimizer.state.values() if "step" in s]
        self.step = max(steps, default=0) + optimizer.skipped_steps
        self._first = self.step + 1

    def _before_step(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Hook before a step."""
        if torch.compiler.is_compiling():
            return None
        self.step += 1
        self._observation = None  # one may be left from a step that failed
        if self.step % self.every and self.step != self._first:
            return None
        hook_start = self._now()
        before = Snapshot(self._optimizer, self._sample)
        self._sample = before.sample
        observation = self._observation = _Observation(before, self._optimizer.skipped_steps, hook_start)
        observation.hook_end = observation.step_start = time.perf_counter()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None

        def timed() -> Any:
            loss = closure()
            observation.step_start = self._now()
            return loss

        return args[:1], {**kwargs, "closure": timed}

    def _after_step(self, *_: object) -> None:
        """Hook after a step."""
        if (observation := self._observation) is None:
            if (self.step + 1) % self.every == 0:
                self._previous_step_end = time.perf_counter()
            return
        now, optimizer = self._now(), self._optimizer
        self._observation = None
        histograms: dict[str, Array] = {}
        scalars = {tag(self.name, "steps", "skipped"): float(optimizer.skipped_steps)}
        for index, group in enumerate(optimizer.param_groups):
            scalars[tag(self.name, "lr", f"group{index}")] = float(group["lr"])
        if optimizer.skipped_steps == observation.skipped_steps and observation.before.indices:
            statistics = StepStatistics(observation.before, optimizer)
            self._write_description(statistics.names)
            scalars |= self._scalars(statistics)
            histograms = self._histograms(statistics)
        if self.step > self._first:
            scalars |= self._seconds(observation, now)
        self._writer.write_values(scalars, histograms, self.step)
        self._observed_step = self.step
        self._observed_time = self._previous_step_end = time.perf_counter()

    def _now(self) -> float:
        """The time once all devices have finished their work, in seconds."""
        devices = {p.device for group in self._optimizer.param_groups for p in group["params"]}
        for device in devices:
            if device.type not in ("cpu", "meta"):
                torch.get_device_module(device).synchronize(device)
        return time.perf_counter()

    # ---------------------------------------------------------------------------------------------- what is written

    def _scalars(self, statistics: StepStatistics) -> dict[str, float]:
        """The values of every group, by tag."""
        values = statistics.by_group(self._membership)
        whole = list(self._groups).index(WHOLE_NETWORK)
        self._final |= {quantity: float(values[quantity][whole]) for quantity in FINAL_QUANTITIES}
        return {
            tag(self.name, quantity, group): value
            for quantity in QUANTITIES
            for group, value in zip(self._groups, values[quantity].tolist(), strict=True)
        }

    def _histograms(self, statistics: StepStatistics) -> dict[str, Array]:
        """The gains of the neurons of every free axis, by a tag with the axis and a tensor that has it."""
        return {
            tag(self.name, "log2_gain", f"{self._first_tensors[axis]}.{axis}"): gains
            for axis, gains in statistics.neuron_gains.items()
        }

    def _seconds(self, observation: _Observation, now: float) -> dict[str, float]:
        """Time of a training step and of the optimizer in it, without the time of the observation."""
        optimizer, inside = now - observation.step_start, now - observation.hook_end
        steps = max(self.step - self._observed_step, 1)
        training = (observation.hook_start - self._observed_time + inside) / steps
        this_step = observation.hook_start - self._previous_step_end + inside
        self._final["seconds"] = training
        return {
            tag(self.name, "seconds", "training_step"): training,
            tag(self.name, "seconds", "optimizer_step"): optimizer,
            tag(self.name, "share_of_time", "optimizer"): optimizer / this_step,
        }

    def _write_description(self, names: tuple[str, ...]) -> None:
        """Write layout and text, the first time and when names or symmetry have changed."""
        described = (names, self._optimizer.symmetry)
        if described == self._described:
            return
        self._described = described
        self._groups = all_groups(names)
        index = {name: column for column, name in enumerate(names)}
        self._membership = np.zeros((len(self._groups), len(names)))
        for row, group in zip(self._membership, self._groups.values(), strict=True):
            row[[index[name] for name in group]] = 1.0
        if (symmetry := self._optimizer.symmetry) is not None:
            self._first_tensors = {axis: name for name in reversed(names) for axis in symmetry.axes_of(name)}
        self.layout = layout_of(self.name, parts_of(names), len(self._optimizer.param_groups))
        self._writer.write_layout(_merged(self._writer.summary_writer, self.layout))
        for title, text in texts_of(self._optimizer.rule, symmetry, self._hparams()).items():
            self._writer.write_text(tag(self.name, "about", title), text, self.step)

    def _hparams(self) -> dict[str, str | float]:
        """The optimizer's hyperparameters."""
        rule, group = self._optimizer.rule, self._optimizer.param_groups[0]
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        hparams = {
            "rule": rule_name_of(rule),
            "theta": pretrained.digest(rule)[:12],
            "lr": float(group.get("initial_lr", group["lr"])),
            "weight_decay": float(group["weight_decay"]),
            "total_steps": group["total_steps"] or "unknown",
            "parameters": sum(p.numel() for p in params),
        }
        return hparams if self.name == "optimizer" else {f"{self.name}.{key}": value for key, value in hparams.items()}


@dataclass
class _Observation:
    """The observation of one step, from the hook before it to the hook after it; times in seconds.

    Args:
        before: The snapshot before the step.
        skipped_steps: Steps skipped before it.
        hook_start: When the hook before the step started.
        hook_end: When that hook ended.
        step_start: When the optimizer started, after the closure.
    """

    before: Snapshot
    skipped_steps: int
    hook_start: float
    hook_end: float = math.nan
    step_start: float = math.nan


def _merged(writer: Any, layout: ChartLayout) -> ChartLayout:
    """A layout with those of other optimizers on the same writer."""
    try:
        layouts = _LAYOUTS.setdefault(writer, {})
    except TypeError:  # it cannot be weakly referenced
        return layout
    layouts.update(layout)
    return layouts
