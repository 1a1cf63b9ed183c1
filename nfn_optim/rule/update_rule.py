"""The update rule: a neural functional network from weights, gradients and moments to an update.

    update = -lr (gain (nominal + learned) + weight_decay p)

    nominal    (1 - share) X + share D
    X          m^ / (sqrt(v^) + eps), Adam's bias-corrected direction
    D          X with its singular values made equal, where X is a matrix (`nfn_optim.rule.orthogonal`); for vectors,
    and
               without `RuleConfig.rank`, share is 0
    learned    sum_k c_k f_k, linear in the features f of the weight (form "linear"), or a network of them ("network")
    gain       (s / s0)^power exp(G + a), s the scale of the tensor, G its growth (`nfn_optim.rule.step_size`)

where lr also falls to zero over the last part of training (`RuleConfig.cooldown`) if the horizon is known, and as a
power of the age (`RuleConfig.fading`) if it is not, the coefficients c of a weight are what its row and its tensor say,
and a the sum of what its row, its column, its taps and its tensor say, each computed by messages between the neurons of
the whole network (`nfn_optim.layers.message_passing`); so the gain is a product of small factors and the linear form
reads the features once. With power = 1 an update is measured in units of its tensor's scale. With the learned part at
zero (`UpdateRule.zero_`) or absent (`UpdateRule.nominal`) the rule is AdamW.

Neurons need not talk at every step: what they say changes slowly. With `RuleConfig.talk_every` above 1 the state keeps
what was said last, O(neurons), and a step in between is one pass over the weights; two with orthogonal directions.

The rule is one pure function: the optimizer calls it without gradients, meta-training with them, and nothing else
computes an update. All of it commutes with permuting neurons.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), arXiv:2302.14040
    Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), Alg. 2, arXiv:1711.05101
    A Closer Look at Learned Optimization (Harrison et al., 2022), Sec. 4, arXiv:2209.11208
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nfn_optim.engine.blocks import Pooled, blocks_of
from nfn_optim.engine.executor import Kernel
from nfn_optim.engine.inductor import run
from nfn_optim.engine.moments import CHANNELS, MOMENTS, ROW_CHANNELS, TINY, State, corrections_of, init_state
from nfn_optim.engine.passes import Network, chosen
from nfn_optim.engine.sharding import Shards
from nfn_optim.engine.sweep import Sweep
from nfn_optim.layers import Incidence, TiedStack
from nfn_optim.rule import features
from nfn_optim.rule.coefficients import Said
from nfn_optim.rule.config import RuleConfig
from nfn_optim.rule.features import TENSOR_CHANNELS
from nfn_optim.rule.gains import GAIN_RANGE, Gains, most_of
from nfn_optim.rule.orthogonal import LARGEST, SIZE, basis_shape
from nfn_optim.rule.schedule import Hyper, by_tensor, cooled, faded, horizon_of, is_zero
from nfn_optim.rule.step_size import agreement, grown
from nfn_optim.rule.subspace import Aiming, hear
from nfn_optim.symmetry import Symmetry

SCALE_UNIT = 0.05  # s0, the root mean square of a typical weight matrix at initialisation
FALLBACK_RMS = 50.0  # a direction that might be of larger root mean square (Adam's has about 1) is not trusted

_stacks: dict[RuleConfig, TiedStack] = {}  # the first one of each kind: what it does depends on its parameters alone


class UpdateRule(nn.Module):
    """A learned update rule; its parameters are theta. A new one equals AdamW (for `power=0` and `gain=1`).

    Theta may carry the leading dimensions of the batch (`torch.func.functional_call` with `(*batch, *shape)` for every
    parameter): every member then has a rule of its own, as the particles of evolution strategies do.

    Args:
        config: What it is made of.

    Example:
        >>> params = {"weight": torch.ones(3, 2)}
        >>> symmetry = Symmetry.separate({"weight": (3, 2)})
        >>> rule = UpdateRule()
        >>> update, state = rule(params, {"weight": torch.ones(3, 2)}, rule.init(params), symmetry, lr=0.1)
        >>> round(update["weight"][0, 0].item(), 4)  # one step of Adam
        -0.1
    """

    def __init__(self, config: RuleConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RuleConfig()
        self.learns = config.hidden > 0
        if self.learns:
            self.gains = Gains()
            out = (CHANNELS if config.form == "linear" else config.weight_hidden) + 1  # the last one is the gain's
            self.stack = TiedStack(ROW_CHANNELS, TENSOR_CHANNELS, config.hidden, out, config.rounds)
            self.power = nn.Parameter(torch.tensor(float(config.power)))
            if config.rank:
                self.share = nn.Parameter(torch.tensor(1.0))
            if config.growth:
                self.growth = nn.Parameter(torch.tensor(float(config.growth)))
                self.waning = nn.Parameter(torch.tensor(float(config.waning)))
            with torch.no_grad():
                self.stack.read_tensors.bias[-1] = GAIN_RANGE * math.atanh(math.log(config.gain) / GAIN_RANGE)
            if config.form == "network":
                self.see = nn.Linear(CHANNELS, config.weight_hidden)
                self.answer = nn.Linear(config.weight_hidden, 1, bias=False)
                nn.init.zeros_(self.answer.weight)

    @classmethod
    def nominal(cls) -> UpdateRule:
        """The rule without a learned part: AdamW with betas (.9, .999) and epsilon 1e-8."""
        return cls(RuleConfig(hidden=0))

    @torch.no_grad()
    def zero_(self) -> UpdateRule:
        """Set the learned part's output to zero, in place; what remains is AdamW."""
        if self.learns:
            for name in ("power", "share", "growth", "waning"):
                if hasattr(self, name):
                    self.get_parameter(name).zero_()
            for value in self.stack.readouts():
                value.zero_()
            if self.config.form == "network":
                self.answer.weight.zero_()
        return self

    def init(self, params: Mapping[str, Tensor], batch_dims: int = 0, *, kept_in: torch.dtype | None = None) -> State:
        """The state before the first step.

        Args:
            params: Name -> tensor `(*batch, *shape)`.
            batch_dims: How many leading dimensions are batch.
            kept_in: Precision of the moments, as in `init_state`. A step in place keeps it, a pure one takes
                moments in bfloat16 and returns them in full precision.
        """
        state = init_state(params, batch_dims, learned=self.learns, kept_in=kept_in)
        for name, values in state.items() if self.learns else ():
            if self.config.growth:
                values["growth"] = torch.zeros_like(values["step"])
            if self.config.talk_every > 1:
                values.update(self._silence(params[name].shape, values["step"]).to_keep())
            if (shape := basis_shape(self.config.rank, params[name].shape[batch_dims:])) is not None:
                values["basis"] = values["step"].new_zeros((*params[name].shape[:batch_dims], *shape))
        return state

    def talks(self, taken: int) -> bool:
        """Whether the neurons talk at the step after so many: at the first ones, then every `talk_every`."""
        return self.learns and (taken < self.config.talk_every or taken % self.config.talk_every == 0)

    def forward(  # noqa: PLR0913 - this is the whole interface of a rule
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: State,
        symmetry: Symmetry,
        *,
        lr: Hyper,
        weight_decay: Hyper = 0.0,
        total_steps: Tensor | float | None = None,
        batch_dims: int = 0,
        talk: bool = True,
        kernel: Kernel | None = None,
        shards: Shards | None = None,
    ) -> tuple[dict[str, Tensor], State]:
        """One step: what to add to the parameters, and the new state. Pure, unless there is a `kernel`.

        Args:
            params: Name -> tensor `(*batch, *shape)`; the names of `symmetry`, in its order or another.
            grads: Name -> gradient of the loss, the same shapes.
            state: What `init` or the last step returned.
            symmetry: The axes of these tensors.
            lr: Learning rate, per step, in Adam's units; 0-d, or `(*batch,)` tensors, or by name.
            weight_decay: Decoupled weight decay, per unit of learning rate; as `lr`.
            total_steps: The horizon in steps, if known; 0 where it is not. A number or `(*batch,)`.
            batch_dims: How many leading dimensions of every tensor are batch: independent networks of one shape.
            talk: Whether the neurons talk at this step, see `talks`; only a rule with `talk_every` above 1 can do
                without, once.
            kernel: Change parameters and state in place instead, and return no update. There is no batch then, nothing
                is differentiated, and parameters whose `lr` is the number 0 keep every bit.
            shards: Where the tensors are parts of larger ones: which, of `symmetry`, is said of the whole. No batch.

        Returns:
            Update and state; new parameters are `params + update`.
        """
        incidence = incidence_of(symmetry)
        names = incidence.names
        steps = torch.stack([state[n]["step"] for n in names], -1) + 1  # (*batch, T)
        rate, decay = by_tensor(lr, names, steps), by_tensor(weight_decay, names, steps)
        if (cooling := self.cooling(steps, total_steps)) is not None:
            rate = rate * cooling
        tensors = [[params[n], grads[n], *(state[n][key] for key in MOMENTS if key in state[n])] for n in names]
        stacked = kernel.least if kernel is not None and shards is None else 0
        blocks = blocks_of(tensors, corrections_of(steps), batch_dims, stacked)
        sweep = Sweep(blocks, kernel)
        found: State = {n: {"step": step} for n, step in zip(names, steps.unbind(-1), strict=True)}
        aiming = Aiming(names, sweep, shards)
        aims = aiming.aims({n: state[n].get("basis") for n in names}, batch_dims) if self.config.rank else {}
        if self.learns and talk:
            pooled = _means(sweep, names, shards)
            rows = {i: by_dim[0][..., [0, 4]] for i, (by_dim, _) in enumerate(pooled) if by_dim}
            for number, basis in aiming.next_bases(aims, rows):
                found[names[number]]["basis"] = basis
            del rows
            whole = torch.stack([tensor for _, tensor in pooled], -2)  # (*batch, T, ROW_CHANNELS)
            growth = self._grown(whole, state, steps, incidence)
            said, untrusted = self._say(pooled, whole, steps, incidence, total_steps, kernel, growth)
            for i, n in enumerate(names):
                found[n]["fallbacks"] = state[n]["fallbacks"] + untrusted[..., i]
                found[n] |= said[i].to_keep() if self.config.talk_every > 1 else {}
                found[n] |= {} if growth is None else {"growth": growth[..., i]}
        else:
            said = self._said_before(state, steps, incidence)
        heard = self._heard(torch.cat([x.words for x in said], -2), rate, decay, incidence)
        said = [Said(x, y.gains) for x, y in zip(torch.split(heard, incidence.lengths, -2), said, strict=True)]
        if shards is not None:
            said = [x.part(name, shards) for name, x in zip(names, said, strict=True)]
        update: dict[str, Tensor] = {}
        for k, block in enumerate(blocks):
            layout = block.layout
            parts = [said[i] for i in layout.numbers]
            heard = layout.join([x.words for x in parts])
            ahead = None
            if self.config.rank:
                heard, ahead = hear(heard, aims.get(k))
            gain = layout.gain([x.gains for x in parts]) if self.learns else None
            if kernel is not None:
                still = {i for i in layout.numbers if is_zero(lr, names[i])}
                sweep.move_(k, heard, gain, self._network(), ahead, len(still) == len(layout.numbers))
                block.write_back(still)
                continue
            u, moments = sweep.answer(k, heard, gain, self._network(), ahead)
            for i, *values in zip(layout.numbers, *(layout.unfold(x) for x in (u, *moments)), strict=True):
                update[names[i]] = values[0]
                found[names[i]] |= dict(zip(MOMENTS, values[1:], strict=False))
        if kernel is None:
            return update, {n: {**state[n], **found[n]} for n in names}
        pairs = [(state[n][key], value) for n in names for key, value in found[n].items()]
        torch._foreach_copy_([old for old, _ in pairs], [chosen(kernel.usable, value, old) for old, value in pairs])
        return update, state

    def cooling(self, steps: Tensor, total_steps: Tensor | float | None) -> Tensor | None:
        """What the learning rate is multiplied by: falls to zero at the end of a known horizon, else slowly with age.

        Args:
            steps: Steps taken, this one included, `(*batch, T)`.
            total_steps: The horizon in steps, as in `forward`.

        Returns:
            `(*batch, T)`, or None where it is always 1.
        """
        config = self.config
        if not config.fading and (not config.cooldown or total_steps is None):
            return None
        untold = faded(steps, config.fading)
        if total_steps is None:
            return untold
        total = horizon_of(total_steps, steps)
        return torch.where(total > 0, cooled(steps, total, config.cooldown, config.bend), untold)

    def _said_before(self, state: State, steps: Tensor, incidence: Incidence) -> list[Said]:
        """What every tensor acts on where nothing is said now: what was said last, or what AdamW says.

        Args:
            state: By name.
            steps: `(*batch, T)`.
            incidence: Whose state it is.
        """
        if not self.learns:
            return [Said(steps.new_ones((*steps.shape[:-1], length, 1))) for length in incidence.lengths]
        lengths = ([s.length for s in segments[1:]] for segments in incidence.segments)
        return [Said.kept(state[n], x) for n, x in zip(incidence.names, lengths, strict=True)]

    def _grown(self, whole: Tensor, state: State, steps: Tensor, incidence: Incidence) -> Tensor | None:
        """The growth of every tensor after this step, `(*batch, T)`, if there is any; arguments as in `_say`."""
        if not self.config.growth:
            return None
        before = torch.stack([state[n]["growth"] for n in incidence.names], -1)
        agreed = agreement(whole, steps, incidence.at(steps)["entries"])
        power = self.growth.unsqueeze(-1) * agreed - self.waning.unsqueeze(-1)
        return grown(before, power, steps, self.config.talk_every)

    def _say(
        self,
        pooled: list[Pooled],
        whole: Tensor,
        steps: Tensor,
        incidence: Incidence,
        total_steps: Tensor | float | None,
        kernel: Kernel | None,
        growth: Tensor | None,
    ) -> tuple[list[Said], Tensor]:
        """What every tensor, its rows, columns and taps say to its weights; costs O(neurons).

        Args:
            pooled: For every tensor the means of its rows by dimension, and its own; is emptied, for it is large.
            whole: The latter of all tensors, `(*batch, T, ROW_CHANNELS)`.
            steps: Steps taken, `(*batch, T)`.
            incidence: Where rows, neurons and tensors meet.
            total_steps: The horizon.
            kernel: Who compiles, if anybody does.
            growth: Of every tensor, `(*batch, T)`, if tensors have one.

        Returns:
            By tensor; and which ones are not trusted to stay in range, so that they say what Adam would,
            `(*batch, T)`.
        """
        index = incidence.at(steps)
        scale, rms = features.scales_of(whole[..., 3], incidence)  # (*batch, T)
        units = features.units_of(whole, scale)  # (*batch, T, CHANNELS)
        described = features.describe(whole, units)
        total = None
        if total_steps is not None:
            total = horizon_of(total_steps, steps)
        time = features.time_features(steps, total)
        tensors = features.tensor_features(described, scale, rms, time, incidence)  # (*batch, T, TENSOR_CHANNELS)
        none = whole[..., :0, :]
        rows = torch.cat([none, *(x for by_dim, _ in pooled for x in by_dim)], -2)
        leading = torch.cat([by_dim[0] if by_dim else x.unsqueeze(-2) for by_dim, x in pooled], -2)
        pooled.clear()
        rows = rows.index_select(-2, index["gathered"])  # (*batch, N, ROW_CHANNELS)
        rows = (kernel or Kernel()).call(features.describe, rows, incidence.tensors_to_rows(units), size=rows.numel())
        if incidence.mutes:
            rows = torch.where(index["mute"], incidence.tensors_to_rows(described), rows)
        by_row, by_tensor = self._exchange(rows, tensors, incidence, kernel)
        del rows  # as large as all that follows

        every = index["tensor_of_leading"]  # F leading rows, of all tensors one after the other
        by_leading = F.pad(by_row, (0, 0, 0, 1)).index_select(-2, index["leading"])  # (*batch, F, channels + 1)
        coefficients = by_leading[..., :-1] + by_tensor[..., :-1].index_select(-2, every)
        unit = self.power.unsqueeze(-1) * (scale / SCALE_UNIT).log()
        unit = torch.exp(unit if growth is None else unit + growth)  # of updates, (*batch, T)
        by_row_gain, by_tensor_gain = self.gains(
            by_row[..., -1], by_tensor[..., -1], unit, incidence
        )  # (*batch, N), (*batch, T)
        del by_row, by_leading
        gain = F.pad(by_row_gain, (0, 1), value=1.0).index_select(-1, index["leading"])  # (*batch, F)
        gain = gain * by_tensor_gain.index_select(-1, every)
        activity = (whole[..., 0] + TINY).sqrt()

        reach = gain * self._reach(
            leading, units.index_select(-2, every), coefficients, activity.index_select(-1, every)
        )
        del leading
        squares = (reach * reach).detach() * index["leading_share"]
        bound = torch.zeros_like(activity).index_add(-1, every, squares).sqrt() * most_of(by_row_gain, incidence)
        trusted = bound / unit.detach() <= FALLBACK_RMS  # False for NaN
        by_row_gain = torch.where(trusted.index_select(-1, index["tensor_of_row"]), by_row_gain, 1.0)
        units = torch.where(trusted.unsqueeze(-1), units, 0.0)
        believed = trusted.index_select(-1, every)
        gain = torch.where(believed, gain, 1.0)
        coefficients = torch.where(believed.unsqueeze(-1), coefficients, 0.0)

        active = torch.where(trusted, activity, 0.0).index_select(-1, every)
        share = trusted * index["matrix"] * self.share.unsqueeze(-1) if self.config.rank else None
        share = None if share is None else share.index_select(-1, every)
        words = self._words(gain, coefficients, units.index_select(-2, every), active, share)
        said = []
        for segments, part in zip(incidence.segments, torch.split(words, incidence.lengths, -2), strict=True):
            gains = tuple(by_row_gain[..., s.start : s.start + s.length] for s in segments[1:])
            said.append(Said(part, gains))
        return said, ~trusted

    def _exchange(
        self, rows: Tensor, tensors: Tensor, incidence: Incidence, kernel: Kernel | None
    ) -> tuple[Tensor, Tensor]:
        """`TiedStack.forward`, compiled where that pays, once for each network."""
        if kernel is None or not kernel.pays(rows.numel()):
            said: tuple[Tensor, Tensor] = self.stack(rows, tensors, incidence)
        else:
            stack = _stacks.setdefault(self.config, self.stack)  # for all rules that are made alike
            said = run(_exchanged, rows, tensors, [*self.stack.parameters()], stack, incidence, sizes=False)
        return said

    def _reach(self, means: Tensor, units: Tensor, coefficients: Tensor, activity: Tensor) -> Tensor:
        """A bound on the root mean square of nominal + learned in every row, by Minkowski's inequality.

        Args:
            means: Means over the rows of raw channels, `(*batch, F, ROW_CHANNELS)`.
            units: `(*batch, F, CHANNELS)`.
            coefficients: `(*batch, F, channels)`.
            activity: Root mean square of the nominal direction of the row's tensor, `(*batch, F)`.

        Returns:
            `(*batch, F)`, NaN where something is.
        """
        rms = means[..., :CHANNELS].sqrt() * units
        if self.config.form == "linear":
            nominal = rms[..., 0]
            if self.config.rank:  # as if all tensors were matrices
                nominal = (
                    nominal * (1 - self.share).unsqueeze(-1).abs() + SIZE * LARGEST * self.share.unsqueeze(-1).abs()
                )
            return (nominal * (1 + coefficients[..., 0])).abs() + (rms * coefficients)[..., 1:].abs().sum(-1)
        broken = 0 * (rms.sum(-1) + coefficients.sum(-1))  # NaN where something is not finite, which tanh may hide
        return rms[..., 0] + activity * self.answer.weight.abs().sum((-2, -1)).unsqueeze(-1) + broken

    @property
    def _scaled_words(self) -> int:
        """How many words, the first ones, are multiplied by the learning rate."""
        return CHANNELS + (self.config.rank > 0) if self.learns and self.config.form == "linear" else 1

    def _words(
        self, gain: Tensor, coefficients: Tensor, units: Tensor, activity: Tensor, share: Tensor | None
    ) -> Tensor:
        """What `passes.answer` wants to hear, but for learning rate and weight decay, `(*batch, F, words)`.

        Args:
            gain: `(*batch, F)`.
            coefficients: `(*batch, F, channels)`.
            units: `(*batch, F, CHANNELS)`.
            activity: `(*batch, F)`.
            share: How much of the nominal direction is orthogonal, `(*batch, F)`, if there is such a thing.
        """
        if self.config.form == "linear":
            nominal, *others = coefficients.unbind(-1)
            others[2] = others[2] * units[..., 3]
            first = gain * (1 + nominal)
            nominals = [first] if share is None else [first * (1 - share), first * share]
            return torch.stack([*nominals, *(gain * c for c in others), units[..., 4]], -1)
        return torch.stack([gain, units[..., 3], units[..., 4], activity, *coefficients.unbind(-1)], -1)

    def _silence(self, shape: Sequence[int], like: Tensor) -> Said:
        """What the weights of a tensor `(*batch, *shape)` act on before anything was said: Adam; `like` `(*batch,)`."""
        first, *others = shape[like.dim() :] or (1,)
        size = self._scaled_words + 1 if self.config.form == "linear" else 4 + self.config.weight_hidden
        words = F.pad(like.new_ones((*like.shape, first, 1)), (0, size - 1))
        return Said(words, tuple(like.new_ones((*like.shape, length)) for length in others))

    def _heard(self, words: Tensor, rate: Tensor | float, decay: Tensor | float, incidence: Incidence) -> Tensor:
        """What `passes.answer` wants to hear, `(*batch, F, words + 1)`.

        Args:
            words: `(*batch, F, words)`.
            rate: Learning rate, a number or `(*batch or none, T or 1)`.
            decay: Weight decay, likewise.
            incidence: Whose rows these are.
        """
        if not isinstance(rate, float | int) or not isinstance(decay, float | int):
            every = incidence.at(words)["tensor_of_leading"]
            none = words.new_zeros(len(incidence.names))
            rate, decay = ((x + none).index_select(-1, every).unsqueeze(-1) for x in (rate, decay))
        scaled = words[..., : self._scaled_words] * -rate
        return torch.cat([scaled, words[..., self._scaled_words :], 0 * words[..., :1] - rate * decay], -1)

    def _network(self) -> Network | None:
        """The network per weight, if the form has one."""
        return (self.see.weight, self.see.bias, self.answer.weight) if hasattr(self, "see") else None


def _exchanged(
    rows: Tensor, tensors: Tensor, theta: Sequence[Tensor], stack: TiedStack, incidence: Incidence
) -> tuple[Tensor, Tensor]:
    """`TiedStack.forward` as a function of its parameters too, in their order."""
    named = {name: value for (name, _), value in zip(stack.named_parameters(), theta, strict=True)}
    found: tuple[Tensor, Tensor] = functional_call(stack, named, (rows, tensors, incidence))
    return found


def _means(sweep: Sweep, names: Sequence[str], shards: Shards | None) -> list[Pooled]:
    """The first pass: means over all tensors, whole ones where they are divided."""
    pooled: dict[int, Pooled] = {}
    for k, block in enumerate(sweep.blocks):
        pooled |= block.layout.means(*sweep.sums(k))
    means = [pooled[i] for i in range(len(names))]
    return means if shards is None else shards.gather(names, means)


@lru_cache(maxsize=64)
def incidence_of(symmetry: Symmetry) -> Incidence:
    """The index lists of a symmetry, made once."""
    return Incidence(symmetry)
