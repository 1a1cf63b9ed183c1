"""Watching an optimizer: hooks before and after every step that, once in an interval, look at what the step did.

    with watch(optimizer, SummaryWriter("runs/mine")):
        train()

Outside of the interval a step costs two calls that count it. Nothing is changed in the optimizer or its rule but for
hooks; copies of them, and what is pickled, have none.
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
from nfn_optim.monitor.charts import QUANTITIES, layout_of, name_of, tag, texts_of
from nfn_optim.monitor.gain_hook import Ear
from nfn_optim.monitor.grouping import WHOLE, Part, all_lines, parts_of
from nfn_optim.monitor.sampling import Sample
from nfn_optim.monitor.step_statistics import Before, Reading
from nfn_optim.monitor.writer import Array, Journal, Layout
from nfn_optim.optimizer import NFNOptimizer

FINAL = ("update_over_weight", "gain", "cosine", "fallbacks")  # shown beside the hyperparameters
_LAYOUTS: WeakKeyDictionary[Any, Layout] = WeakKeyDictionary()  # by writer, for it shows only one


def watch(optimizer: torch.optim.Optimizer, writer: Any, every: int = 50, name: str = "optimizer") -> Observer:
    """Write to TensorBoard what an optimizer does to every layer.

    Args:
        optimizer: An `NFNOptimizer`, or a wrapper around one, such as accelerate's or Lightning's.
        writer: A `torch.utils.tensorboard.SummaryWriter`, or something like it.
        every: Steps from one look to the next; the first step is looked at in any case.
        name: What its tags begin with; optimizers that share a writer need different ones.

    Returns:
        A handle: `close` it after training, or use it in a `with` statement.

    Raises:
        TypeError: It is another optimizer, or nothing can be written to `writer`.
        ValueError: `every` is less than 1, or the name is empty.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = NFNOptimizer(model)
        >>> with SummaryWriter(tempfile.mkdtemp()) as writer, watch(optimizer, writer, every=10) as watching:
        ...     for _ in range(20):
        ...         model(torch.ones(1, 3)).sum().backward()
        ...         optimizer.step()
        >>> watching.step
        20
    """
    while not isinstance(optimizer, NFNOptimizer):
        if not hasattr(optimizer, "optimizer"):
            raise TypeError(
                f"expected an NFNOptimizer, found {type(optimizer).__name__}; pass the optimizer itself; one that a "
                f"trainer has wrapped will do"
            )
        optimizer = optimizer.optimizer
    if every < 1 or not name:
        raise ValueError(f"expected every >= 1 and a name, found every={every!r} and name={name!r}")
    return Observer(optimizer, Journal(writer), every, name)


class Observer:
    """The handle that `watch` returns.

    Args:
        optimizer: The optimizer.
        journal: Where to write.
        every: Steps from one look to the next.
        name: What tags begin with.

    Attributes:
        step: Steps of the optimizer so far, skipped ones and those before the watch included.
        layout: The charts on the page of custom scalars; merge them with your own for `writer.add_custom_scalars`.
    """

    def __init__(self, optimizer: NFNOptimizer, journal: Journal, every: int, name: str) -> None:
        self.every, self.name = every, name
        self.layout: Layout = {}
        self._optimizer, self._journal = optimizer, journal
        self._ear = Ear(optimizer.rule)
        self._look: _Look | None = None
        self._sample: Sample | None = None
        self._shown: tuple[object, ...] = ()  # the names and the symmetry that layout and text are about
        self._lines: dict[str, Part] = {}
        self._carriers: dict[str, str] = {}  # axis -> the first tensor that has it
        self._members: Array = np.zeros((0, 0))
        self._last: dict[str, float] = {}  # what the whole network showed last
        self._seen_step, self._seen = 0, math.nan  # which step was looked at last, and when that had been done
        self._ended = math.nan  # when the step before the next look had been done
        self._count(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._count),
        ]

    # ----------------------------------------------------------------------------------------------------- the handle

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, **final: float) -> None:
        """Stop watching, and write the hyperparameters beside the final values.

        Args:
            final: What came of the training, by name, to be shown with them: `close(accuracy=0.9)`.
        """
        if self._handles:
            self.remove()
            values = {tag(self.name, "final", key): value for key, value in {**final, **self._last}.items()}
            self._journal.hparams(self._facts(), values, self.step)
            self._journal.flush()

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._ear.end_step()
        self._look = None

    # ------------------------------------------------------------------------------------------------------ the hooks

    def _count(self, optimizer: torch.optim.Optimizer) -> None:
        """Go on counting from the steps that the state has seen."""
        assert isinstance(optimizer, NFNOptimizer)
        steps = [int(s["step"].max()) for s in optimizer.state.values() if "step" in s]
        self.step = max(steps, default=0) + optimizer.skipped_steps
        self._first = self.step + 1

    def _before(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Hook before a step."""
        if torch.compiler.is_compiling():
            return None
        self.step += 1
        self._ear.begin_step()
        self._look = None  # also one at a step that failed
        if self.step % self.every and self.step != self._first:
            return None
        entered = self._now()
        before = Before(self._optimizer, self._sample)
        self._sample = before.sample
        look = self._look = _Look(before, self._optimizer.skipped_steps, entered)
        look.left = look.begun = time.perf_counter()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None

        def timed() -> Any:
            loss = closure()
            look.begun = self._now()
            return loss

        return args[:1], {**kwargs, "closure": timed}

    def _after(self, *_: object) -> None:
        """Hook after a step."""
        self._ear.end_step()
        if (look := self._look) is None:
            if (self.step + 1) % self.every == 0:
                self._ended = time.perf_counter()
            return
        now, optimizer = self._now(), self._optimizer
        self._look = None
        neurons: dict[str, Array] = {}
        values = {tag(self.name, "steps", "skipped"): float(optimizer.skipped_steps)}
        for number, group in enumerate(optimizer.param_groups):
            values[tag(self.name, "lr", f"group{number}")] = float(group["lr"])
        if optimizer.skipped_steps == look.skipped and look.before.places:
            reading = Reading(look.before, optimizer, self._ear)
            self._describe(reading.names)
            values |= self._values(reading)
            neurons = self._neurons(reading)
        if self.step > self._first:
            values |= self._seconds(look, now)
        self._journal.numbers(values, neurons, self.step)
        self._seen_step = self.step
        self._seen = self._ended = time.perf_counter()

    def _now(self) -> float:
        """The time when all devices have done what they were given, in seconds."""
        devices = {p.device for group in self._optimizer.param_groups for p in group["params"]}
        for device in devices:
            if device.type not in ("cpu", "meta"):
                torch.get_device_module(device).synchronize(device)
        return time.perf_counter()

    # ---------------------------------------------------------------------------------------------- what is written

    def _values(self, reading: Reading) -> dict[str, float]:
        """What every line shows, by tag."""
        shown = reading.lines(self._members)
        whole = list(self._lines).index(WHOLE)
        self._last |= {word: float(shown[word][whole]) for word in FINAL}
        return {
            tag(self.name, word, line): value
            for word in QUANTITIES
            for line, value in zip(self._lines, shown[word].tolist(), strict=True)
        }

    def _neurons(self, reading: Reading) -> dict[str, Array]:
        """The gains of the neurons of every free axis, by a tag that says where the axis is."""
        return {
            tag(self.name, "log2_gain", f"{self._carriers[axis]}.{axis}"): gains
            for axis, gains in reading.neurons.items()
        }

    def _seconds(self, look: _Look, now: float) -> dict[str, float]:
        """Time of a step of training and of the optimizer in it, without what looking took."""
        optimizer, inside = now - look.begun, now - look.left
        training = (look.entered - self._seen + inside) / max(self.step - self._seen_step, 1)
        self._last["seconds"] = training
        return {
            tag(self.name, "seconds", "training_step"): training,
            tag(self.name, "seconds", "optimizer_step"): optimizer,
            tag(self.name, "share_of_time", "optimizer"): optimizer / (look.entered - self._ended + inside),
        }

    def _describe(self, names: tuple[str, ...]) -> None:
        """Write layout and text, when they are known first and when they have changed."""
        shown = (names, self._optimizer.symmetry)
        if shown == self._shown:
            return
        self._shown = shown
        self._lines = all_lines(names)
        place = {name: number for number, name in enumerate(names)}
        self._members = np.zeros((len(self._lines), len(names)))
        for row, line in zip(self._members, self._lines.values(), strict=True):
            row[[place[name] for name in line]] = 1.0
        if (symmetry := self._optimizer.symmetry) is not None:
            self._carriers = {axis: name for name in reversed(names) for axis in symmetry.axes_of(name)}
        self.layout = layout_of(self.name, parts_of(names), len(self._optimizer.param_groups))
        self._journal.layout(_merged(self._journal.writer, self.layout))
        for title, text in texts_of(self._optimizer.rule, symmetry, self._facts()).items():
            self._journal.text(tag(self.name, "about", title), text, self.step)

    def _facts(self) -> dict[str, str | float]:
        """What is fixed about the optimizer, as hyperparameters."""
        rule, group = self._optimizer.rule, self._optimizer.param_groups[0]
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        facts = {
            "rule": name_of(rule),
            "theta": pretrained.digest(rule)[:12],
            "lr": float(group.get("initial_lr", group["lr"])),
            "weight_decay": float(group["weight_decay"]),
            "total_steps": group["total_steps"] or "not told",
            "parameters": sum(p.numel() for p in params),
        }
        return facts if self.name == "optimizer" else {f"{self.name}.{key}": value for key, value in facts.items()}


@dataclass
class _Look:
    """One look, from before a step to behind it.

    Args:
        before: What there was before.
        skipped: Steps skipped before.
        entered: When the hook before the step began, in seconds.
        left: When it ended.
        begun: When the optimizer began, behind the closure.
    """

    before: Before
    skipped: int
    entered: float
    left: float = math.nan
    begun: float = math.nan


def _merged(writer: Any, layout: Layout) -> Layout:
    """A layout with those of other optimizers on the same writer."""
    try:
        known = _LAYOUTS.setdefault(writer, {})
    except TypeError:  # no weak reference to it can be made
        return layout
    known.update(layout)
    return known
