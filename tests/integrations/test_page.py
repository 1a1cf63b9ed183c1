"""docs/integrations.md is true: every piece of it runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from digits import batches, loader, network
from prose import Prose, language_model
from torch.nn import functional as F
from torch.utils.data import default_collate

from nfn_optim import NFNOptimizer

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
PIECES = {
    f"{title}: {code.splitlines()[0]}": code
    for title, section in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}


@pytest.fixture
def _group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_all_of_it_is_looked_at() -> None:
    assert len(PIECES) == PAGE.count("```python") >= 10


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.usefixtures("_group")
def test_it_runs(piece: str, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    text = piece.startswith("transformers")
    namespace: dict[str, Any] = {
        "torch": torch,
        "NFNOptimizer": NFNOptimizer,
        "model": language_model() if text else network(),
        "dataset": Prose(),
        "loader": loader(1),
        "arguments": TrainingArguments(str(tmp_path), report_to=[], use_cpu=True),
    }
    exec(PIECES[piece], namespace)
    if "Classifier" in namespace:
        namespace["Classifier"].parameters = namespace["model"].parameters
        namespace["optimizer"] = namespace["Classifier"].configure_optimizers(namespace["Classifier"])
    if text:
        namespace["optimizer"] = namespace["trainer"].create_optimizer()
    optimizers = namespace.get("optimizers", {}).values() or [namespace["optimizer"]]
    images, classes = batches(1)[0]
    with torch.compiler.set_stance("force_eager"):
        output = namespace.get("compiled", namespace["model"])(
            **default_collate([Prose()[0]]) if text else {"input": images}
        )
    loss = output.loss if text else F.cross_entropy(output, classes)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        found = optimizer
        while not isinstance(found, NFNOptimizer):
            found = found.optim if hasattr(found, "optim") else found.optimizer
        assert found.symmetry is not None
