"""Rule files: what is written comes back, and what was damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from meta_train.recipes import BASE
from nfn_optim import RuleConfig, UpdateRule, pretrained
from nfn_optim.pretrained import format_1


@pytest.fixture
def rule() -> UpdateRule:
    torch.manual_seed(0)
    return UpdateRule(RuleConfig(hidden=4, power=1.0))


def test_a_rule_comes_back_bit_for_bit(rule: UpdateRule, tmp_path: Path) -> None:
    digest = pretrained.save(rule, tmp_path / "one.safetensors")
    back = pretrained.load(tmp_path / "one.safetensors")
    assert back.config == rule.config
    assert all(torch.equal(back.state_dict()[name], value) for name, value in rule.state_dict().items())
    assert not any(p.requires_grad for p in back.parameters())
    assert pretrained.save(back, tmp_path / "two.safetensors") == digest
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def rewritten(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Write the file again with changed metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        theta = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    change(metadata)
    save_file(theta, path, metadata=metadata)


def other_config(metadata: dict[str, str]) -> None:
    stated = json.loads(metadata[pretrained.FORMAT])
    config = json.loads(stated["config"]) | {"rank": 9}
    metadata[pretrained.FORMAT] = json.dumps(stated | {"config": json.dumps(config)})


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def forged(config: object, theta: dict[str, torch.Tensor] | None = None) -> Callable[[Path], None]:
    """Write another file in its place, with a hash that is right."""

    def write(path: Path) -> None:
        tensors = {"power": torch.zeros(())} if theta is None else theta
        text = json.dumps(config)
        stated = {"config": text, "sha256": pretrained._digest(text, tensors)}
        save_file(tensors, path, metadata={pretrained.FORMAT: json.dumps(stated)})

    return write


def metadata(text: str) -> Callable[[Path], None]:
    """Replace what the metadata say."""
    return lambda path: rewritten(path, lambda metadata: metadata.update({pretrained.FORMAT: text}))


CONFIG = {"hidden": 4, "rounds": 2, "direction": "adam", "power": 0.0, "gain": 1.0, "cooldown": 0.0}
BROKEN = {name: torch.full_like(p, torch.nan) for name, p in UpdateRule(RuleConfig(hidden=4)).state_dict().items()}
UNREADABLE = "not a rule that this version can read"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-10]), "not a whole safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
    "not safetensors": (lambda path: path.write_bytes(b"\x80\x04N." * 99), "not a whole safetensors file"),
    "flipped bit": (flipped, "was changed after it was written"),
    "other config": (lambda path: rewritten(path, other_config), "was changed after it was written"),
    "other tensors": (lambda path: rewritten(path, lambda metadata: metadata.clear()), "expected .* to be a rule"),
    "no JSON": (metadata("{"), UNREADABLE),
    "no entries": (metadata("{}"), UNREADABLE),
    "a list": (metadata("[1]"), UNREADABLE),
    "an entry of the future": (forged(CONFIG | {"attention": True}), UNREADABLE),
    "a word for a number": (forged(CONFIG | {"hidden": "many"}), UNREADABLE),
    "out of range": (forged(CONFIG | {"hidden": -1}), UNREADABLE),
    "not an object": (forged([4, 2]), UNREADABLE),
    "too large": (forged(CONFIG | {"hidden": 10**9, "rounds": 10**9}), "too large for 1 numbers"),
    "theta of another rule": (forged(CONFIG), "not those of"),
    "theta not finite": (forged(CONFIG, BROKEN), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_advice(rule: UpdateRule, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rule.safetensors"
    pretrained.save(rule, path)
    do, says = DAMAGES[damage]
    do(path)
    with pytest.raises(ValueError, match=says):
        pretrained.load(path)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(FileNotFoundError, match=r"adamw.*nonsense"):
        pretrained.load("nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        pretrained.card("nonsense")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(
    rule: UpdateRule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rule.safetensors"
    pretrained.save(rule, path)
    before = path.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        pretrained.save(UpdateRule(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", pretrained.names()[2:])
def test_shipped_rules_load_and_their_cards_name_them(name: str) -> None:
    rule = pretrained.load(name)
    assert rule.learned
    folder = Path(pretrained.__file__).parent
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        digest = json.loads(file.metadata()[pretrained.FORMAT])["sha256"]
    assert digest in pretrained.card(name)
    assert sum(p.numel() for p in rule.parameters()) < 10_000


def test_base_is_the_rule_of_its_recipe() -> None:
    assert pretrained.digest(pretrained.load("base")) == pretrained.digest(UpdateRule(BASE))


def test_the_default_is_one_of_the_shipped_rules() -> None:
    assert pretrained.names()[:2] == ("adamw", "default")
    assert pretrained.DEFAULT in pretrained.names()[2:]
    assert pretrained.digest(pretrained.load("default")) == pretrained.digest(pretrained.load(pretrained.DEFAULT))
    assert pretrained.card("default") == pretrained.card() == pretrained.card(pretrained.DEFAULT)


def test_a_file_of_format_1_is_converted() -> None:
    """The rule `default_1` before names changed; 82 of its 137 numbers had no effect and are dropped."""
    old = pretrained.load(Path(__file__).parent / "data" / "rule_format_1.safetensors")
    assert pretrained.digest(old) == pretrained.digest(pretrained.load("default_1"))
    assert sum(p.numel() for p in old.parameters()) == 55


def test_format_1_keeps_hidden_channels_in_use_and_refuses_what_it_cannot_run() -> None:
    config = {"hidden": 4, "rounds": 1, "form": "linear", "weight_hidden": 8, "talk_every": 2, "rank": 0, "growth": 0.0}
    theta = {"stack.read_tensors.weight": torch.ones(6, 4), "stack.hear_tensors.0.weight": torch.ones(4, 4)}
    entries, renamed = format_1.convert(config, theta)
    assert RuleConfig(**entries) == RuleConfig(hidden=4, rounds=1, refresh_every=2)
    head, message = (f"network.message_passing.{name}.weight" for name in ("tensor_head", "tensor_to_row.0"))
    assert renamed.keys() == {head, message}
    with pytest.raises(ValueError, match="form is 'network'"):
        format_1.convert(config | {"form": "network"}, theta)


def test_adamw_needs_no_file() -> None:
    assert not pretrained.load("adamw").learned


def test_loading_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    pretrained.load()
    assert torch.equal(torch.rand(3), expected)
