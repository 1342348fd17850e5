"""From chunks to actions: an action queue, and temporal ensembling of overlapping chunks."""

import torch
from jaxtyping import Float
from torch import Tensor

from policies.interface import PolicyView


class ActionQueue:
    """Execute the first ``n_action_steps`` of a chunk, then ask for the next chunk."""

    def __init__(self, n_action_steps: int):
        if n_action_steps < 1:
            raise ValueError(f"n_action_steps={n_action_steps} must be at least 1")
        self.n_action_steps = n_action_steps
        self.reset()

    def reset(self, n_envs: int = 1) -> None:
        """Forget the current chunk; to be called at the start of an episode."""
        self._chunk: Tensor | None = None
        self._age = 0

    def wants_prediction(self) -> bool:
        """Whether the next step needs a fresh chunk."""
        return self._chunk is None or self._age >= self.n_action_steps

    def steps_used(self) -> int:
        """Only the first ``n_action_steps`` of a chunk are ever executed."""
        return self.n_action_steps

    def step(
        self, chunk: Float[Tensor, "batch chunk action"] | None
    ) -> Float[Tensor, "batch action"]:
        """Return the action to execute now.

        Args:
            chunk: A fresh prediction, given exactly when :meth:`wants_prediction` is true.

        Raises:
            ValueError: If the chunk is shorter than ``n_action_steps``.
        """
        if chunk is not None:
            if chunk.shape[1] < self.n_action_steps:
                raise ValueError(
                    f"n_action_steps={self.n_action_steps} exceeds the chunk of {chunk.shape[1]}"
                )
            self._chunk, self._age = chunk, 0
        if self._chunk is None:
            raise ValueError("the queue is empty: pass a chunk when wants_prediction() is true")
        action = self._chunk[:, self._age]
        self._age += 1
        return action


class TemporalEnsembler:
    """Average all chunks that cover the present step (ACT, Zhao et al. 2023, Algorithm 2).

    The prediction made i steps after the oldest one weighs ``w_i = exp(-coefficient * i)``; the
    weights are normalised. A positive coefficient favours older predictions (the original uses
    0.01), zero weighs all alike, a negative one favours newer predictions.

    The average is kept online: only its running value and the number of predictions per step.
    """

    def __init__(self, coefficient: float, chunk_size: int):
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        self.coefficient = coefficient
        self.chunk_size = chunk_size
        self._weights = torch.exp(-coefficient * torch.arange(chunk_size))
        self._cumulative = torch.cumsum(self._weights, dim=0)
        self.reset()

    def reset(self, n_envs: int = 1) -> None:
        """Forget all predictions; to be called at the start of an episode."""
        self._average: Tensor | None = None
        self._count: Tensor | None = None

    def wants_prediction(self) -> bool:
        """Ensembling needs a fresh chunk at every step."""
        return True

    def steps_used(self) -> None:
        """Every step of a chunk goes into the average."""

    def step(
        self, chunk: Float[Tensor, "batch chunk action"] | None
    ) -> Float[Tensor, "batch action"]:
        """Fold a fresh chunk into the average and return the action to execute now.

        Raises:
            ValueError: If no chunk is given or it is not ``chunk_size`` long.
        """
        if chunk is None or chunk.shape[1] != self.chunk_size:
            given = "none" if chunk is None else chunk.shape[1]
            raise ValueError(f"the ensembler needs a chunk of {self.chunk_size}, given: {given}")
        if self._average is None or self._count is None:
            average = chunk.clone()
            count = torch.ones(self.chunk_size, 1, dtype=torch.long, device=chunk.device)
        else:
            weights = self._weights.to(chunk.device, chunk.dtype)
            cumulative = self._cumulative.to(chunk.device, chunk.dtype)
            overlap = self._average * cumulative[self._count - 1]
            overlap += chunk[:, :-1] * weights[self._count]
            overlap /= cumulative[self._count]
            average = torch.cat([overlap, chunk[:, -1:]], dim=1)
            count = torch.cat(
                [(self._count + 1).clamp(max=self.chunk_size), torch.ones_like(self._count[:1])]
            )
        self._average, self._count = average[:, 1:], count[1:]
        return average[:, 0]


def check_controller(n_action_steps: int | None, temporal_ensemble_coeff: float | None) -> None:
    """Refuse to be asked for a queue and an ensemble at once.

    Args:
        n_action_steps: Of a queue, or None.
        temporal_ensemble_coeff: Of an ensemble, or None.

    Raises:
        ValueError: If both are given.
    """
    if temporal_ensemble_coeff is not None and n_action_steps is not None:
        raise ValueError(
            f"n_action_steps={n_action_steps} has no meaning with temporal ensembling, which "
            "predicts at every step: set one of the two to null"
        )


def controller_of(
    view: PolicyView, n_action_steps: int | None, temporal_ensemble_coeff: float | None
) -> ActionQueue | TemporalEnsembler:
    """Build what turns a policy's chunks into actions.

    Args:
        view: The policy.
        n_action_steps: Length of the queue; the policy's own when None.
        temporal_ensemble_coeff: Average overlapping chunks in place of the queue, unless None.
    """
    if temporal_ensemble_coeff is not None:
        return TemporalEnsembler(temporal_ensemble_coeff, view.chunk_size)
    return ActionQueue(n_action_steps or view.n_action_steps)
