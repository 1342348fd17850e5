"""The interface of all methods that explain a policy: what is explained, and by what."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from attention.attribution import Attribution
from policies.act import ACTPolicy
from policies.interface import Observation, PolicyView

Aggregation = Literal["each", "sum", "norm"]


@dataclass(frozen=True)
class Target:
    """Which part of the predicted chunk is explained.

    Raises:
        ValueError: If a list is empty, not rising, or the aggregation unknown.
    """

    queries: tuple[int, ...] = (0,)
    """Chunk steps, rising."""
    dimensions: tuple[int, ...] | None = None
    """Action dimensions, rising; all when None."""
    aggregation: Aggregation = "each"
    """How methods with gradients treat several coordinates: relevance of ``each``, then its mean;
    relevance for their ``sum``; or for their L2 ``norm``."""

    def __post_init__(self) -> None:
        for name, given in (("queries", self.queries), ("dimensions", self.dimensions)):
            if given is not None and (
                not given or list(given) != sorted(set(given)) or min(given) < 0
            ):
                raise ValueError(f"{name} {list(given)}: give rising numbers from 0 on")
        if self.aggregation not in ("each", "sum", "norm"):
            raise ValueError(f"aggregation {self.aggregation!r}: give each, sum or norm")

    def check(self, view: PolicyView) -> None:
        """Refuse what a policy does not predict.

        Raises:
            ValueError: If a query or dimension lies beyond the chunk or the action.
        """
        if self.queries[-1] >= view.chunk_size:
            raise ValueError(
                f"queries {list(self.queries)}: the policy predicts chunk steps 0 to "
                f"{view.chunk_size - 1}"
            )
        n_dimensions = view.data_schema.action_dim
        if self.dimensions is not None and self.dimensions[-1] >= n_dimensions:
            raise ValueError(
                f"dimensions {list(self.dimensions)}: actions have dimensions 0 to "
                f"{n_dimensions - 1}"
            )

    def coordinates(
        self, actions: Float[Tensor, "batch query action"]
    ) -> Float[Tensor, "batch coordinate"]:
        """Flatten the explained coordinates of ``actions``, which hold ``queries`` only."""
        chosen = actions if self.dimensions is None else actions[..., list(self.dimensions)]
        return chosen.flatten(1)

    def aggregate(
        self, coordinates: Float[Tensor, "batch coordinate"]
    ) -> Float[Tensor, "batch output"]:
        """What is explained: every coordinate, or one number made of all."""
        if self.aggregation == "sum":
            return coordinates.sum(1, keepdim=True)
        if self.aggregation == "norm":
            return coordinates.norm(dim=1, keepdim=True)
        return coordinates


class Method(ABC):
    """One way of finding out what a policy's actions depend on."""

    name: ClassVar[str]
    """As ``--method`` calls it."""

    @abstractmethod
    def check(self, view: PolicyView) -> None:
        """Refuse a policy that this method cannot explain.

        Raises:
            ValueError: Saying which method, which policy and what to use instead.
        """

    @abstractmethod
    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """Explain some frames, all at once.

        Never changes the policy, its gradients or its modes.

        Args:
            view: The policy, in eval mode.
            observation: Frames, on the policy's device.
            target: What is explained.

        Raises:
            ValueError: If the policy is not one for this method, or the target not of the policy.
        """


class ACTMethod(Method):
    """A method that looks inside: for our ACT, which LeRobot's ACT folders are loaded as."""

    def check(self, view: PolicyView) -> None:
        """Only ACT, with at least one camera."""
        self.policy(view)

    def policy(self, view: PolicyView) -> ACTPolicy:
        """The policy as ACT.

        Raises:
            ValueError: If it is another.
        """
        if not isinstance(view, ACTPolicy):
            raise ValueError(
                f"method {self.name}: looks inside ACT, the policy is {type(view).__name__}; "
                "occlusion explains any policy"
            )
        if not view.data_schema.cameras:
            raise ValueError(f"method {self.name}: the policy has no camera to look through")
        return view


def explained_actions(
    policy: ACTPolicy, observation: Observation, queries: Sequence[int]
) -> Float[Tensor, "batch query action"]:
    """What the network decides, in data units; differentiable.

    For relative actions that is the way from the observed state: the state that is added to it
    afterwards is no work of the network, and would drown it in attributions.
    """
    actions = policy.predict_chunk(observation, queries)
    if policy.relative_actions and observation.state is not None:
        return actions - observation.state[:, None]
    return actions
