"""Symmetry of widely used models: free axes, how many of them are certified, and the time that tracing takes.

    python benchmarks/symmetry_zoo.py
    python benchmarks/symmetry_zoo.py --running

The small models, those of the tests (`tests/real_models.py`), are traced and certified. The large models are traced at
full size on the meta device, without data, so that they cannot be certified. Seconds are the median of three traces on
one thread, after a warm-up trace. Writes `symmetry_zoo.json` and `symmetry_zoo.md`.

With `--running` the small models are traced as an optimizer does it, in forward passes that run: in training, in
evaluation, and in training under autocast (bfloat16). Each of these symmetries, of parameters only, is certified on a
new network; where a buffer has one of the axes, together with the buffers. Writes `symmetry_zoo_running.json` and
`symmetry_zoo_running.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from result import setting, write
from torch import Tensor, nn

from nfn_optim.symmetry import certify, symmetry_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torchvision_ops

torchvision_ops.declare()

import timm  # noqa: E402 - after the declaration
import transformers  # noqa: E402
from live import live  # noqa: E402
from real_model import RealModel  # noqa: E402
from real_models import REAL_MODELS, UNTRACED  # noqa: E402

TRACES = 3
MODES: Mapping[str, tuple[bool, Callable[[], Any]]] = {
    "training": (True, contextlib.nullcontext),
    "evaluation": (False, contextlib.nullcontext),
    "autocast": (True, lambda: torch.autocast("cpu", torch.bfloat16)),
}
"""Whether the module trains, and what its call runs in."""


def _image(name: str) -> tuple[str, Callable[[], nn.Module], Mapping[str, Tensor]]:
    return f"timm.{name}", lambda: timm.create_model(name), {"x": torch.zeros(2, 3, 224, 224)}


def _text(model: str, **options: Any) -> tuple[str, Callable[[], nn.Module], Mapping[str, Tensor]]:
    """A model from transformers in its default configuration, except for `options`; without a cache, as in training."""
    kind = getattr(transformers, model)
    ids = torch.zeros(2, 128, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return f"transformers.{model}", lambda: kind(kind.config_class(use_cache=False, **options)), batch


LARGE = (
    _image("resnet50"),
    _image("convnext_base"),
    _image("vit_base_patch16_224"),
    _image("swin_base_patch4_window7_224"),
    _image("mixer_b16_224"),
    _text("GPT2LMHeadModel"),
    _text("BertForMaskedLM"),
    _text("T5ForConditionalGeneration", d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0),
    _text(
        "LlamaForCausalLM",
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    _text("Qwen3ForCausalLM", num_hidden_layers=36),
    _text("MixtralForCausalLM"),
)


def row_of(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], meta: bool) -> dict[str, Any]:
    """Trace a model, certify it unless it is on the meta device, and return a row of the table."""
    seconds = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(1 + TRACES):
            start = time.perf_counter()
            symmetry = symmetry_of(module, *args, **kwargs)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        certificate = None if meta else certify(module, symmetry, *args, **kwargs)
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "tensors": len(list(module.parameters())),
        "free": len(symmetry.free),
        "certified": None if certificate is None else len(certificate.errors) - len(certificate.broken),
        "seconds_to_trace": statistics.median(seconds[1:]),
        "seconds_to_certify": None if certificate is None else time.perf_counter() - start,
        "warnings": sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)}),
    }
    print(row, flush=True)
    return row


def small(models: Iterable[RealModel]) -> list[dict[str, Any]]:
    """A row for every small model."""
    return [row_of(model.name, model.module(), *model.batch(), meta=False) for model in models]


def running(models: Iterable[RealModel]) -> list[dict[str, Any]]:
    """A row for every small model, with what its forward passes show in each mode."""
    rows = []
    for model in models:
        certified: dict[str, int] = {}
        rows.append({"model": model.name} | {mode: _live(model, mode, certified) for mode in MODES})
        print(rows[-1], flush=True)
    return rows


def _live(model: RealModel, mode: str, certified: dict[str, int]) -> dict[str, Any]:
    """The free axes that a forward pass shows in some mode, how many are certified, and the warnings.

    Args:
        model: The model.
        mode: Of `MODES`.
        certified: Symmetry -> number of certified axes; what is new is added.
    """
    training, around = MODES[mode]
    module, (args, kwargs) = model.module().train(training), model.batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with around():
                symmetry = live(module, *args, **kwargs)
        except RuntimeError as error:  # torch has no kernel for the model in this mode
            return {"free": 0, "certified": 0, "warnings": [f"{mode} fails: {str(error).split('. ')[0]}"]}
        if str(symmetry) not in certified:
            certificate = certify(model.module(), symmetry, *args, **kwargs)  # whose buffers are as they were
            if certificate.broken:  # perhaps since a buffer has the axis
                whole = symmetry_of(model.module(), *args, **kwargs)
                if whole.restrict(symmetry.dims).canonical() == symmetry.canonical():
                    certificate = certify(model.module(), whole, *args, **kwargs)
            certified[str(symmetry)] = len(symmetry.free) - len(certificate.broken)
    ours = ("no rule", "could not be traced")
    return {
        "free": len(symmetry.free),
        "certified": certified[str(symmetry)],
        "warnings": sorted({str(w.message) for w in caught if any(part in str(w.message) for part in ours)}),
    }


def large() -> list[dict[str, Any]]:
    """A row for every large model; images are passed by position, texts by keyword."""
    rows = []
    for name, build, batch in LARGE:
        with torch.device("meta"):
            module = build()
        named = {key: value.to("meta") for key, value in batch.items()}
        args = tuple([named.pop("x")] if "x" in named else [])
        rows.append(row_of(name, module, args, named, meta=True))
    return rows


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The rows as a Markdown table."""
    lines = ["| model | parameters | tensors | free axes | certified | seconds to trace |", "|---|---|---|---|---|---|"]
    for row in rows:
        certified = "-" if row["certified"] is None else row["certified"]
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['tensors']} | {row['free']} | {certified} "
            f"| {row['seconds_to_trace']:.2f} |"
        )
    return lines


def table_of_running(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All modes together, then the models that are not the same and free of warnings in all of them."""
    lines = ["| mode | free axes | certified | models with all axes certified, no warning |", "|---|---|---|---|"]
    for mode in MODES:
        part = [row[mode] for row in rows]
        good = sum(bool(row["free"]) and row["free"] == row["certified"] and not row["warnings"] for row in part)
        free, certified = (sum(row[key] for row in part) for key in ("free", "certified"))
        lines.append(f"| {mode} | {free:,} | {certified:,} | {good} of {len(part)} |")
    lines += [
        "",
        "Models that differ between modes, or have a warning:",
        "",
        "| model | certified of free axes | warning |",
    ]
    lines.append("|---|---|---|")
    for row in rows:
        cells = [f"{row[mode]['certified']} of {row[mode]['free']}" for mode in MODES]
        messages = sorted({message for mode in MODES for message in row[mode]["warnings"]})
        if len(set(cells)) > 1 or messages or row["training"]["free"] != row["training"]["certified"]:
            lines.append(f"| {row['model']} | {', '.join(cells)} | {'; '.join(messages)} |")
    return lines


def main() -> None:
    """Measure all models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--running", action="store_true", help="trace small models in forward passes that run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = setting("torch", "timm", "transformers")
    if options.running:
        found = running((*REAL_MODELS, *UNTRACED))
        text = "\n".join([f"{about}.", "", *table_of_running(found)])
        write(options.out, "symmetry_zoo_running", text, {"about": about, "small": found})
        return
    rows = {"full size, on the meta device": large(), "small": small((*REAL_MODELS, *UNTRACED))}
    lines = [f"{about}. Seconds: median of {TRACES}."]
    for title, part in rows.items():
        lines += ["", f"**{title.capitalize()}**", "", *table(part)]
    write(options.out, "symmetry_zoo", "\n".join(lines), {"about": about, **rows})


if __name__ == "__main__":
    main()
