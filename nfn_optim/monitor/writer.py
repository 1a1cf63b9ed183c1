"""Writing to TensorBoard, through a SummaryWriter or any object with its methods.

Only `add_scalar` is required; the others are used if they exist. With torch's own SummaryWriter the scalars of a step
are one event, some fifteen times faster than one event each, and hyperparameters go into the same run, where
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
ChartLayout = dict[str, dict[str, list[str]]]
"""Section -> chart -> regular expressions of tags."""


class Writer:
    """Writes values, text, charts and hyperparameters.

    Args:
        summary_writer: A `torch.utils.tensorboard.SummaryWriter`, or an object with its methods.

    Raises:
        TypeError: It has no `add_scalar`.
    """

    def __init__(self, summary_writer: Any) -> None:
        if not callable(getattr(summary_writer, "add_scalar", None)):
            raise TypeError(
                f"expected a SummaryWriter, or an object with its add_scalar, found {type(summary_writer).__name__}; "
                f"use torch.utils.tensorboard.SummaryWriter(folder)"
            )
        self.summary_writer = summary_writer

    def write_values(self, scalars: Mapping[str, float], histograms: Mapping[str, Array], step: int) -> None:
        """Write scalars and histograms; values that are not finite are left out.

        Args:
            scalars: Values by tag.
            histograms: Arrays of values by tag.
            step: Of the optimizer.
        """
        scalars = {tag: float(value) for tag, value in scalars.items() if math.isfinite(value)}
        histograms = {tag: values[np.isfinite(values)] for tag, values in histograms.items()}
        histograms = {tag: values for tag, values in histograms.items() if len(values) > 0}
        if (event_file := self._event_file()) is None:
            for tag, value in scalars.items():
                self.summary_writer.add_scalar(tag, value, step)
            for tag, values in histograms.items():
                self._add("histogram", tag, values, step, bins=BINS)
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415 - slow to import

        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        entries += [Summary.Value(tag=tag, histo=_histogram(values)) for tag, values in histograms.items()]
        event_file.add_summary(Summary(value=entries), step)

    def write_text(self, tag: str, markdown: str, step: int) -> None:
        """Write an entry of the Text page."""
        self._add("text", tag, markdown, step)

    def write_layout(self, layout: ChartLayout) -> None:
        """Write the charts of the Custom Scalars page; they replace those of an earlier layout."""
        charts = {name: {title: ["Multiline", tags] for title, tags in of.items()} for name, of in layout.items()}
        self._add("custom_scalars", charts)

    def write_hparams(self, hparams: Mapping[str, str | float], metrics: Mapping[str, float], step: int) -> None:
        """Write hyperparameters, and the final metrics by tag."""
        if (event_file := self._event_file()) is None:
            self._add("hparams", dict(hparams), dict(metrics))
            return
        from torch.utils.tensorboard.summary import hparams as summaries  # noqa: PLC0415 - slow to import

        for summary in summaries(dict(hparams), dict(metrics)):  # type: ignore[no-untyped-call]
            event_file.add_summary(summary, step)
        self.write_values(metrics, {}, step)

    def flush(self) -> None:
        """Write buffered events to disk."""
        if callable(flush := getattr(self.summary_writer, "flush", None)):
            flush()

    def _add(self, kind: str, *args: object, **kwargs: object) -> None:
        """Call `add_<kind>`, if there is one."""
        if callable(add := getattr(self.summary_writer, f"add_{kind}", None)):
            add(*args, **kwargs)

    def _event_file(self) -> Any:
        """The open event file of torch's SummaryWriter; None if it is closed or has another `add_scalar`."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import

        writer = self.summary_writer
        is_torch = isinstance(writer, SummaryWriter) and type(writer).add_scalar is SummaryWriter.add_scalar
        return writer.file_writer if is_torch else None


def _histogram(values: Array) -> Any:
    """Counts in bins of equal width, as TensorBoard stores them."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto  # noqa: PLC0415 - slow to import

    counts, edges = np.histogram(values, BINS)
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=len(values),
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.tolist()],  # no value is to the left of the first edge
    )
