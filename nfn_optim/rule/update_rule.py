"""The update rule: from weights, gradients and moments to an update.

    update = -lr (gain (direction + learned) + weight_decay p)

    direction  Adam's, m^ / (sqrt(v^) + eps), or another one for matrices (`nfn_optim.rule.direction`)
    learned    c_0 direction + sum_k c_k f_k, linear in the other features f of the weight
    gain       (s / s0)^power exp(G + a), s the scale of the tensor, G its step-size adaptation (`step_size`)

The coefficients c of a weight are the sum of those of its row and its tensor, a the sum of those of its row, its
column, its taps and its tensor; all of them are outputs of message passing over the whole network
(`nfn_optim.layers.message_passing`). So the gain is a product of small factors, and an update reads the features once.
With power = 1 updates are measured in units of their tensor's scale. lr is multiplied by a factor of time
(`UpdateRule.lr_factor`). With the learned part at zero (`UpdateRule.zero_`) or absent (`UpdateRule.adamw`) the rule is
AdamW.

Coefficients change slowly. With `RuleConfig.refresh_every` above 1 a step between two refreshes uses those that the
state caches, O(neurons), and is a single pass over the weights; two with orthogonal directions.

`UpdateRule.__call__` is a pure function: meta-training and inner loops differentiate it. `UpdateRule.step_` does the
same in place, for the optimizer. Both compute coefficients by the same code; nothing else computes an update. All of it
commutes with permuting neurons.

References:
    Permutation Equivariant Neural Functionals (Zhou et al., 2023), arXiv:2302.14040
    Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019), Alg. 2, arXiv:1711.05101
    A Closer Look at Learned Optimization (Harrison et al., 2022), Sec. 4, arXiv:2209.11208
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nfn_optim.engine.blocks import blocks_of
from nfn_optim.engine.executor import Execution, Executor, InPlaceExecutor, LowRank, Mixture, PureExecutor
from nfn_optim.engine.form import Form
from nfn_optim.engine.moments import MOMENTS, State, init_moments, moment_constants
from nfn_optim.engine.passes import Terms, where_finite
from nfn_optim.engine.sharding import Shards
from nfn_optim.rule.coefficients import UNSCALED, Coefficients
from nfn_optim.rule.config import DIRECTIONS, RuleConfig
from nfn_optim.rule.direction import StepDirection
from nfn_optim.rule.hyperparameters import Hyper, by_tensor, horizon_of, is_zero
from nfn_optim.rule.members import Members, members_of, pack
from nfn_optim.rule.network import CoefficientNetwork
from nfn_optim.rule.pooled import Pooled
from nfn_optim.rule.pretrained_weights import initial_log_step_size
from nfn_optim.rule.schedule import cooldown_factor, inverse_time_factor
from nfn_optim.rule.step import Hyperparameters, Step, incidence_of
from nfn_optim.symmetry import Symmetry

EAGER = Execution()
X_TERMS: dict[bool, Terms] = {False: frozenset({"adam"}), True: frozenset({"adam", "slow", "gradient"})}
"""Of which X is made, by `RuleConfig.mixes`."""
NO_TERMS: Terms = frozenset()
BlockCoefficients = tuple[Tensor, Tensor | None, LowRank | None]
"""Of a block for the update pass: row coefficients, column gain, and what else there is of the direction."""


class UpdateRule(nn.Module):
    """A learned update rule; its parameters are theta. A new one equals AdamW (for `power=0` and `gain=1`).

    Theta may carry the leading dimensions of the batch (`torch.func.functional_call` with `(*batch, *shape)` for every
    parameter): every member then has a rule of its own, as the particles of evolution strategies do.

    Args:
        config: Its configuration.

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
        self.learned = config.learned
        if self.learned:
            self.direction = DIRECTIONS[config.direction](config)
            self.network = CoefficientNetwork(config)
        self._entry_shapes: dict[tuple[tuple[int, ...], Form | None], dict[str, torch.Size]] = {}

    @classmethod
    def adamw(cls) -> UpdateRule:
        """The rule without a learned part: AdamW with betas (.9, .999) and epsilon 1e-8."""
        return cls(RuleConfig(learned=False))

    @torch.no_grad()
    def zero_(self) -> UpdateRule:
        """Set the learned part's output to zero, in place; what remains is AdamW."""
        if self.learned:
            self.direction.zero_()
            for value in self.network.output_parameters():
                value.zero_()
        return self

    def terms(self) -> Terms:
        """Of which updates may be made with the present theta, whatever the network; synchronises."""
        return self.network.terms() if self.learned else X_TERMS[False]

    def init(
        self,
        params: Mapping[str, Tensor],
        batch_dims: int = 0,
        *,
        forms: Mapping[str, Form] | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first step.

        Args:
            params: Name -> tensor `(*batch, *shape)`.
            batch_dims: How many leading dimensions are batch.
            forms: Of the tensors that hold several, by name: `nfn_optim.rule.members.forms_of` the symmetry.
            state_dtype: Dtype of the moments; None for that of everything else, float32, or float64 for float64
                parameters. `step_` keeps it; a pure step reads moments in bfloat16 and returns them in full precision.
        """
        state: State = {}
        for name, p in params.items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            counter = torch.zeros(p.shape[:batch_dims], dtype=dtype, device=p.device)
            state[name] = init_moments(p, slow=self.learned, dtype=state_dtype or dtype) | {"step": counter}
            state[name] |= self._init_entries(p, counter, (forms or {}).get(name))
        return state

    def _init_entries(self, p: Tensor, counter: Tensor, form: Form | None = None) -> dict[str, Tensor]:
        """What the learned part remembers of a tensor `(*batch, *shape)`; `counter` `(*batch,)`."""
        if not self.learned:
            return {}
        if form is not None:
            members = form.members_of(p, counter.dim())
            return pack([self._init_entries(member, counter) for member in members], counter.dim())
        entries = {"fallbacks": torch.zeros_like(counter)}
        if self.config.adapt_rate:
            entries["log_step_size"] = initial_log_step_size(p, counter.dim()).to(counter)
        entries |= Coefficients.adam(p.shape, self.direction.terms, counter).to_state()
        return entries | self.direction.init_state(p, counter.dim())

    def entry_shapes(self, shape: tuple[int, ...], form: Form | None = None) -> dict[str, torch.Size]:
        """Shapes of what the learned part remembers of a tensor of this shape, by name of the entry."""
        if (shape, form) not in self._entry_shapes:
            like = torch.empty(shape, device="meta")
            entries = self._init_entries(like, like.new_zeros(()), form)
            self._entry_shapes[shape, form] = {key: value.shape for key, value in entries.items()}
        return self._entry_shapes[shape, form]

    def refreshes(self, steps_taken: int) -> bool:
        """Whether coefficients are computed at the step after so many: at the first ones, then at regular intervals."""
        every = self.config.refresh_every
        return self.learned and (steps_taken < every or steps_taken % every == 0)

    def lr_factor(self, steps: Tensor, total_steps: Tensor | float | None) -> Tensor | None:
        """Factor of the learning rate: falls to zero at the end of a known horizon, else slowly with age.

        Args:
            steps: Steps taken, this one included, `(*batch, T)`.
            total_steps: The horizon in steps, as in `forward`.

        Returns:
            `(*batch, T)`, or None where it is always 1.
        """
        config = self.config
        if not config.inverse_time_power and (not config.cooldown or total_steps is None):
            return None
        unknown = inverse_time_factor(steps, config.inverse_time_power)
        if total_steps is None:
            return unknown
        total = horizon_of(total_steps, steps)
        known = cooldown_factor(steps, total, config.cooldown, config.cooldown_power)
        return torch.where(total > 0, known, unknown)

    def forward(  # noqa: PLR0913 - the whole interface of a rule
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
        refresh: bool = True,
    ) -> tuple[dict[str, Tensor], State]:
        """One step: the update, to be added to the parameters, and the new state. Pure and differentiable.

        Args:
            params: Name -> tensor `(*batch, *shape)`; the names of `symmetry`, in its order or another.
            grads: Name -> gradient of the loss, the same shapes.
            state: Of `init` or of the last step.
            symmetry: The axes of these tensors.
            lr: Learning rate, per step, in Adam's units; a number, 0-d or `(*batch,)` tensors, or by name.
            weight_decay: Decoupled weight decay, per unit of learning rate; as `lr`.
            total_steps: The horizon in steps, if known; 0 where it is not. A number or `(*batch,)`.
            batch_dims: How many leading dimensions of every tensor are batch: independent networks of one shape.
            refresh: Whether to compute coefficients at this step, see `refreshes`; else the cached ones are used.

        Returns:
            Update and state; new parameters are `params + update`.
        """
        members = self._members(symmetry)
        params, grads = members.split(params, batch_dims), members.split(grads, batch_dims)
        state = members.split_state(state, self.entry_shapes, batch_dims)
        hyper = Hyperparameters(members.split_hyper(lr), members.split_hyper(weight_decay), total_steps)
        step = self._begin(params, grads, state, members.symmetry, hyper, batch_dims)
        executor = PureExecutor(step.blocks)
        coefficients, new_state = self._coefficients(executor, step, refresh)
        update: dict[str, Tensor] = {}
        for index, of_block in enumerate(coefficients):
            layout = step.blocks[index].layout
            u, moments = executor.update(index, *of_block)
            for i, *values in zip(layout.indices, *(layout.unfold(x) for x in (u, *moments)), strict=True):
                update[step.names[i]] = values[0]
                new_state[step.names[i]] |= dict(zip(MOMENTS, values[1:], strict=False))
        new_state = {name: {**state[name], **new_state[name]} for name in step.names}
        return members.join(update, batch_dims), members.join_state(new_state, batch_dims)

    @torch.no_grad()
    def step_(  # noqa: PLR0913 - as `forward`
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: State,
        symmetry: Symmetry,
        *,
        lr: Hyper,
        weight_decay: Hyper = 0.0,
        total_steps: Tensor | float | None = None,
        refresh: bool = True,
        execution: Execution = EAGER,
        shards: Shards | None = None,
    ) -> None:
        """One step in place: `forward` without a batch, which changes parameters and state.

        Args:
            params: As of `forward`; those whose `lr` is the number 0 keep every bit.
            grads: Likewise.
            state: Likewise; tensors are written into.
            symmetry: Likewise, of whole tensors.
            lr: Likewise.
            weight_decay: Likewise.
            total_steps: Likewise.
            refresh: Likewise.
            execution: How the passes are run.
            shards: Which parts of the tensors are local; None if all are whole.
        """
        members = self._members(symmetry)
        state = members.split_state(state, self.entry_shapes, shards=shards)
        whole, shards = shards, members.split_shards(shards, params)
        params, grads = members.split(params, shards=whole), members.split(grads, shards=whole)
        hyper = Hyperparameters(members.split_hyper(lr), members.split_hyper(weight_decay), total_steps)
        stack_below = execution.compile_from if shards is None else 0
        step = self._begin(params, grads, state, members.symmetry, hyper, stack_below=stack_below)
        executor = InPlaceExecutor(step.blocks, execution)
        coefficients, new_state = self._coefficients(executor, step, refresh, shards)
        for index, of_block in enumerate(coefficients):
            block = step.blocks[index]
            frozen = {i for i in block.layout.indices if is_zero(hyper.lr, step.names[i])}
            low_rank = of_block[-1]
            covered = X_TERMS[self.config.mixes] if low_rank is not None and low_rank[1] is None else NO_TERMS
            executor.apply_(index, *of_block, frozen=len(frozen) == len(block.layout.indices), covered=covered)
            block.write_back(frozen)
        pairs = [(state[name][key], value) for name in step.names for key, value in new_state[name].items()]
        new = [where_finite(execution.grads_finite, value, old) for old, value in pairs]
        torch._foreach_copy_([old for old, _ in pairs], new)

    def _members(self, symmetry: Symmetry) -> Members:
        """The members of all tensors; without a learned part all tensors are whole."""
        return members_of(symmetry) if self.learned else Members.whole(symmetry)

    def _begin(
        self,
        params: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: State,
        symmetry: Symmetry,
        hyper: Hyperparameters,
        batch_dims: int = 0,
        stack_below: int = 0,
    ) -> Step:
        """Arrange the tensors of a step; arguments as of `forward` and `layouts_of`."""
        incidence = incidence_of(symmetry)
        names = incidence.names
        steps = torch.stack([state[name]["step"] for name in names], -1) + 1  # (*batch, T)
        tensors = [[params[n], grads[n], *(state[n][key] for key in MOMENTS if key in state[n])] for n in names]
        constants = moment_constants(steps, self.config.beta1, self.config.beta2)
        blocks = blocks_of(tensors, constants, batch_dims, stack_below)
        return Step(incidence, state, steps, blocks, hyper, batch_dims)

    def _coefficients(
        self, executor: Executor, step: Step, refresh: bool, shards: Shards | None = None
    ) -> tuple[Iterator[BlockCoefficients], State]:
        """The coefficients of every block, computed when they are needed, and the new state but for the moments."""
        names, incidence = step.names, step.incidence
        new_state: State = {name: {"step": s} for name, s in zip(names, step.steps.unbind(-1), strict=True)}
        if not self.learned:
            ones = (step.steps.new_ones((*step.steps.shape[:-1], length, 1)) for length in incidence.lengths)
            packed = self._with_hyperparameters(torch.cat([*ones], -2), None, step)
            return self._by_block(packed, None, StepDirection(), step, shards), new_state
        pooled, coefficients = None, []
        if refresh:
            pooled = Pooled.of(executor, incidence, shards)
            coefficients, entries = self.network(executor, self.direction, pooled, step)
            new_state = {n: new_state[n] | of_tensor for n, of_tensor in zip(names, entries, strict=True)}
        else:
            lengths = ([s.length for s in segments] or [1] for segments in incidence.segments)
            coefficients = [Coefficients.from_state(step.state[n], x) for n, x in zip(names, lengths, strict=True)]
        mixture = self._mixture(coefficients, step, shards)
        direction = self.direction.prepare(executor, step, shards, pooled, mixture)
        if pooled is not None:
            for i, changed in direction.next_state(pooled.leading_by_tensor()):
                new_state[names[i]] |= changed
        tensor_gain = torch.stack([x.tensor_gain for x in coefficients], -1)  # (*batch, T)
        row_gain = torch.cat([x.row_gain for x in coefficients], -1)  # (*batch, F)
        gain = row_gain * tensor_gain.index_select(-1, incidence.at(row_gain)["tensor_of_leading"])
        packed = self._with_hyperparameters(torch.cat([x.row_coeffs for x in coefficients], -2), gain, step)
        return self._by_block(packed, coefficients, direction, step, shards), new_state

    def _by_block(
        self,
        packed: Tensor,
        coefficients: Sequence[Coefficients] | None,
        direction: StepDirection,
        step: Step,
        shards: Shards | None,
    ) -> Iterator[BlockCoefficients]:
        """Cut the coefficients of all leading rows `(*batch, F, terms + 8)` into those of every block."""
        by_tensor = list(torch.split(packed, step.incidence.lengths, -2))
        if shards is not None:
            by_tensor = [x[shards.local_slice(name, 0)] for x, name in zip(by_tensor, step.names, strict=True)]
            coefficients = coefficients and [x.local(n, shards) for x, n in zip(coefficients, step.names, strict=True)]
        for index, block in enumerate(step.blocks):
            layout = block.layout
            rows = layout.gather_rows([by_tensor[i] for i in layout.indices])
            row_coeffs, low_rank = direction.combine(index, rows)
            gain = None
            if coefficients is not None:
                gain = layout.gain([coefficients[i].column_gains for i in layout.indices])
            yield row_coeffs, gain, low_rank

    def _mixture(self, coefficients: Sequence[Coefficients], step: Step, shards: Shards | None) -> Mixture:
        """Of which X is made, by index of the block; empty if it is Adam's everywhere."""
        if not self.config.mixes:
            return {}
        parts = [x.row_coeffs[..., -2:] for x in coefficients]
        if shards is not None:
            parts = [x[shards.local_slice(name, 0)] for name, x in zip(step.names, parts, strict=True)]
        layouts = [block.layout for block in step.blocks]
        return {k: layout.gather_rows([parts[i] for i in layout.indices]) for k, layout in enumerate(layouts)}

    def _with_hyperparameters(self, row_coeffs: Tensor, gain: Tensor | None, step: Step) -> Tensor:
        """Multiply by gains and learning rate, and append the coefficient of weight decay.

        Args:
            row_coeffs: Of all leading rows, `(*batch, F, terms + 7)`; without a learned part ones, `(*batch, F, 1)`.
            gain: Of rows and tensors, `(*batch, F)`; None for 1.
            step: The step.

        Returns:
            `(*batch, F, terms + 8)`; without a learned part `(*batch, F, 2)`.
        """
        rate, decay = (by_tensor(x, step.names, step.steps) for x in (step.hyper.lr, step.hyper.weight_decay))
        if (factor := self.lr_factor(step.steps, step.hyper.total_steps)) is not None:
            rate = rate * factor
        if not isinstance(rate, float | int) or not isinstance(decay, float | int):
            of_leading = step.incidence.at(row_coeffs)["tensor_of_leading"]
            zeros = row_coeffs.new_zeros(len(step.names))
            rate, decay = ((x + zeros).index_select(-1, of_leading).unsqueeze(-1) for x in (rate, decay))
        scaled = row_coeffs if gain is None else row_coeffs[..., :-UNSCALED] * gain.unsqueeze(-1)
        unscaled = row_coeffs[..., :0] if gain is None else row_coeffs[..., -UNSCALED:]
        return torch.cat([scaled * -rate, unscaled, 0 * row_coeffs[..., :1] - rate * decay], -1)


def step_with_theta_(rule: UpdateRule, theta: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
    """`UpdateRule.step_` with other tensors in the place of the rule's, by name."""
    functional_call(_InPlace(rule), {f"rule.{name}": value for name, value in theta.items()}, args, kwargs)


class _InPlace(nn.Module):
    """`UpdateRule.step_` as the forward of a module, which `functional_call` wants."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.rule.step_(*args, **kwargs)
