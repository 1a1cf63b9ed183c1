"""Writing to TensorBoard, through any object that looks like a SummaryWriter.

`add_scalar` is all that such an object must have; what else it lacks is left out. For torch's own the scalars of a step
are written as one event, which is some fifteen times faster than one each, and hyperparameters into the same run, where
`add_hparams` would open another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
BINS = 30  # of a histogram
Layout = dict[str, dict[str, list[str]]]
"""Category -> chart -> regular expressions of tags."""


class Journal:
    """What is written goes here.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or something like it.

    Raises:
        TypeError: It has no `add_scalar`.
    """

    def __init__(self, writer: Any) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                f"expected a SummaryWriter, or an object with its add_scalar, found {type(writer).__name__}; "
                f"use torch.utils.tensorboard.SummaryWriter(folder)"
            )
        self.writer = writer

    def numbers(self, scalars: Mapping[str, float], histograms: Mapping[str, Array], step: int) -> None:
        """Write numbers and the distributions of others.

        Args:
            scalars: By tag; those that are not finite are left out.
            histograms: By tag; values that are not finite are left out.
            step: Of the optimizer.
        """
        scalars = {tag: float(value) for tag, value in scalars.items() if math.isfinite(value)}
        histograms = {tag: values[np.isfinite(values)] for tag, values in histograms.items()}
        histograms = {tag: values for tag, values in histograms.items() if len(values) > 0}
        if (events := self._events()) is None:
            for tag, value in scalars.items():
                self.writer.add_scalar(tag, value, step)
            for tag, values in histograms.items():
                self._add("histogram", tag, values, step, bins=BINS)
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415 - slow to import

        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        entries += [Summary.Value(tag=tag, histo=_histogram(values)) for tag, values in histograms.items()]
        events.add_summary(Summary(value=entries), step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a page."""
        self._add("text", tag, markdown, step)

    def layout(self, layout: Layout) -> None:
        """Say which charts the page of custom scalars has; it takes the place of an earlier layout."""
        charts = {name: {title: ["Multiline", tags] for title, tags in of.items()} for name, of in layout.items()}
        self._add("custom_scalars", charts)

    def hparams(self, hparams: Mapping[str, str | float], metrics: Mapping[str, float], step: int) -> None:
        """Write hyperparameters, and what came of them by tag."""
        if (events := self._events()) is None:
            self._add("hparams", dict(hparams), dict(metrics))
            return
        from torch.utils.tensorboard.summary import hparams as summaries  # noqa: PLC0415 - slow to import

        for summary in summaries(dict(hparams), dict(metrics)):  # type: ignore[no-untyped-call]
            events.add_summary(summary, step)
        self.numbers(metrics, {}, step)

    def flush(self) -> None:
        """Let readers see what was written."""
        if callable(flush := getattr(self.writer, "flush", None)):
            flush()

    def _add(self, what: str, *args: object, **kwargs: object) -> None:
        if callable(add := getattr(self.writer, f"add_{what}", None)):
            add(*args, **kwargs)

    def _events(self) -> Any:
        """The file of torch's own writer, if this is one that is open and does nothing else with scalars."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import

        own = isinstance(self.writer, SummaryWriter) and type(self.writer).add_scalar is SummaryWriter.add_scalar
        return self.writer.file_writer if own else None


def _histogram(values: Array) -> Any:
    """Counts in bins of one width, as TensorBoard stores them."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto  # noqa: PLC0415 - slow to import

    counts, edges = np.histogram(values, BINS)
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=len(values),
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.tolist()],  # nothing is to the left of the first edge
    )
