"""What a policy would do, and where it looks, in a world and in its mirror image.

A policy that respects a mirror answers the mirrored observation with the mirrored action. How far
it is from that needs no rollout: the same instants are shown to it on both sides, and both answers
are compared on one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attention.attribution import Attribution
from attention.gradients import Relevancy
from attention.method import Target
from attention.study import explain
from envs.rollout import EpisodeRecording, episode_observation
from envs.task import Task
from envs.transfer import through_mirrors
from landscapes.grid import Grid
from landscapes.landscape import Landscape, Predictions
from landscapes.methods import Likelihood, Probe
from landscapes.study import kernel_scale, predict_frames
from policies.act import ACTPolicy
from policies.interface import Batch, Observation, PolicyView, SamplingPolicyView
from policies.mirror import Mirror

METHOD = Relevancy()
"""How attention is read; on ACT only."""
TARGET = Target((0,))
"""The action to execute now is explained."""


@dataclass(frozen=True)
class Side:
    """What a policy would do at some instants, as one arm has them."""

    batch: Batch
    """What is to be seen there."""
    point: Float[Tensor, "frame query action"]
    """What the policy would execute."""
    landscape: Landscape
    attribution: Attribution | None
    """Relevance of every pixel; None for a policy whose attention is not known."""


@dataclass(frozen=True)
class BothSides:
    """The same instants on the seen arm, and on another without and with the flip."""

    seen: Side
    plain: Side
    """The other arm, the policy as it is."""
    flipped: Side
    """The other arm, the policy behind the mirrors."""
    redrawn: Landscape
    """Of the seen arm, from other random numbers: what a landscape owes to its samples alone."""
    mirrors: tuple[Mirror, ...]
    """From the other arm's world to that of the seen one."""

    def total_variation(self, side: Side) -> Float[Tensor, "frame query"]:
        """Share of the landscape's probability that lies elsewhere than on the seen arm, 0 to 1.

        Args:
            side: Of the other arm; it is compared in the coordinates of the seen one.
        """
        return self._apart(_reflect_pictures(side.landscape.mass.double(), self.mirrors))

    def noise_floor(self) -> Float[Tensor, "frame query"]:
        """Share that lies elsewhere on the seen arm itself, once its chunks are drawn anew."""
        return self._apart(self.redrawn.mass.double())

    def _apart(
        self, theirs: Float[Tensor, "frame query height width"]
    ) -> Float[Tensor, "frame query"]:
        ours = self.seen.landscape.mass.double()
        inside = (ours - theirs).abs().sum((-1, -2))
        # What lies off the board is a place, too.
        outside = (ours.sum((-1, -2)) - theirs.sum((-1, -2))).abs()
        return (inside + outside) / 2

    def map_correlation(self, side: Side) -> Float[Tensor, " frame"]:
        """Pearson correlation of attention maps over all pixels, NaN where one of them is flat.

        Args:
            side: Of the other arm; it is compared in the coordinates of the seen one.

        Raises:
            ValueError: If there are no maps.
        """
        if self.seen.attribution is None or side.attribution is None:
            raise ValueError("there are no attention maps: only those of ACT are known")
        ours, theirs = self.seen.attribution.maps, side.attribution.maps
        one = torch.cat([values.flatten(1) for values in ours.values()], dim=1).double()
        other = torch.cat(
            [_reflect_pictures(theirs[name], self.mirrors).flatten(1) for name in ours], dim=1
        ).double()
        one, other = (values - values.mean(1, keepdim=True) for values in (one, other))
        lengths = one.norm(dim=1) * other.norm(dim=1)
        return (one * other).sum(1) / torch.where(lengths > 0, lengths, torch.nan)


def instants(
    view: PolicyView, task: Task, recordings: Sequence[EpisodeRecording], n_frames: int
) -> Batch:
    """Take instants spread evenly over recorded episodes, as the policy sees them.

    The simulator is put into each recorded state, at rest, and drawn again.

    Args:
        view: Whose cameras, columns and history to show.
        task: That the episodes are of.
        recordings: One after the other.
        n_frames: Instants; fewer where the episodes have fewer.

    Returns:
        On the CPU, with the seed as the number of the episode, and with the actions that were
        executed.

    Raises:
        ValueError: If there is nothing to take.
    """
    places = [
        (recording, step) for recording in recordings for step in range(len(recording.actions))
    ]
    if not places or n_frames < 1:
        raise ValueError(f"{n_frames} of {len(places)} instants: give at least one")
    # Without the first instants of all, where every arm stands still.
    chosen = np.linspace(0, len(places), min(n_frames, len(places)), endpoint=False)
    offset = len(places) / len(chosen) / 2
    env = task.make()
    parts = []
    try:
        for place in chosen:
            recording, step = places[int(place + offset)]
            seen = []
            for age in range(view.n_obs_steps - 1, -1, -1):
                env.reset_to(recording.simulator_states[max(step - age, 0)])
                seen.append(env.observe())
            steps = step + np.arange(view.chunk_size)
            last = len(recording.actions) - 1
            parts.append(
                Batch(
                    observation=episode_observation(view, seen).rows(slice(-1, None)),
                    actions=torch.from_numpy(recording.actions[steps.clip(max=last)])[None].float(),
                    action_is_pad=torch.from_numpy(steps > last)[None],
                    episode_index=torch.tensor([recording.seed]),
                    frame_index=torch.tensor([step]),
                    simulator_state=torch.from_numpy(recording.simulator_states[step])[None],
                )
            )
    finally:
        env.close()
    return Batch.concatenate(parts)


def in_mirror(
    recordings: Sequence[EpisodeRecording], mirrors: Sequence[Mirror]
) -> list[EpisodeRecording]:
    """Bring recorded episodes of the seen arm to the other side, for :func:`instants` there.

    Args:
        recordings: Of the seen arm.
        mirrors: From the other arm's world to that of the seen one.
    """
    found = []
    for recording in recordings:
        states = torch.from_numpy(recording.simulator_states)
        actions = torch.from_numpy(recording.actions)
        for mirror in reversed(mirrors):
            states, actions = mirror.simulator_state(states), mirror.vectors(actions)
        found.append(
            replace(
                recording,
                simulator_states=states.numpy(),
                actions=actions.numpy(),
                observations=None,
            )
        )
    return found


@torch.no_grad()
def redraw_distance(
    view: PolicyView, batch: Batch, batch_size: int = 64
) -> Float[Tensor, "frame chunk"] | None:
    """How far two chunks lie apart that a policy draws for one observation: the floor of an error.

    LeRobot's policies seed their noise with the bytes of what they see, so that a mirror, or one
    rounded bit, draws it anew.

    Args:
        view: In eval mode, on the device of ``batch``.
        batch: What it sees.
        batch_size: Frames that go through the network together.

    Returns:
        In the unit of actions; None for a policy that executes no drawn chunk (ACT's z is 0).
    """
    if isinstance(view, ACTPolicy) or not isinstance(view, SamplingPolicyView):
        return None
    apart = []
    for start in range(0, len(batch), batch_size):
        observation = batch.observation.rows(slice(start, start + batch_size))
        try:
            one, other = (view.sample_chunks(observation, 1, seed)[:, 0] for seed in (0, 1))
        except ValueError:
            # So says a policy of LeRobot that has one answer only.
            return None
        apart.append((one - other).double().norm(dim=-1))
    return torch.cat(apart)


@torch.no_grad()
def equivariance_error(
    view: PolicyView, batch: Batch, mirrors: Sequence[Mirror], batch_size: int = 64
) -> Float[Tensor, "frame chunk"]:
    """How far a policy is from answering a mirrored observation with the mirrored action.

    ``|M f(M o) - f(o)|`` with the mirror M, the length of the difference of two actions: 0 for a
    policy that respects the mirror, unless it draws noise (:func:`redraw_distance`).

    Args:
        view: In eval mode, on the device of ``batch``.
        batch: What it sees on its own arm.
        mirrors: From the other arm's world to that of the seen one.
        batch_size: Frames that go through the network together.

    Returns:
        In the unit of actions (PushT: px).
    """
    apart = []
    for start in range(0, len(batch), batch_size):
        observation = batch.observation.rows(slice(start, start + batch_size))
        here = view.predict_chunk(observation).double()
        for mirror in reversed(mirrors):
            observation = mirror.observation(observation)
        there = view.predict_chunk(observation).double()
        for mirror in mirrors:
            there = mirror.vectors(there)
        apart.append((there - here).norm(dim=-1))
    return torch.cat(apart)


def look_at_both_sides(
    view: SamplingPolicyView,
    batch: Batch,
    other: Batch,
    mirrors: Sequence[Mirror],
    horizons: tuple[int, ...],
    calibration: Predictions | None = None,
    n_samples: int = 32,
    seed: int = 0,
    resolution: int = 128,
) -> BothSides:
    """Ask a policy what it would do on both sides of a mirror, and where it looks.

    With the flip it is asked as it acts, behind the mirrors, about what the other arm's own
    environment shows: an error of the mirror, the environment or the policy around the policy
    shows as a difference from the seen side.

    Args:
        view: In eval mode, on the device of both batches, with actions of two dimensions.
        batch: What it sees on its own arm, with simulator states.
        other: The same instants, as the environment of the other arm shows them.
        mirrors: From the other arm's world to that of the seen one.
        horizons: Chunk steps.
        calibration: Predictions on demonstrations at these steps, which ACT's kernels are fitted
            to; other policies' samples choose their own bandwidth.
        n_samples: Action chunks drawn per frame.
        seed: Of the drawn chunks.
        resolution: Cells of the board along each axis.

    Raises:
        ValueError: If the policy has no landscape, or needs a calibration.
    """
    behind = through_mirrors(view, mirrors)
    assert isinstance(behind, SamplingPolicyView)
    outwards = list(reversed(mirrors))
    extent = mirrors[0].extent
    grid = Grid(resolution, high=(extent, extent))

    def answers(
        asked: SamplingPolicyView, seen: Batch, fitted_to: Predictions | None, seed: int
    ) -> tuple[Predictions, Landscape]:
        predictions = predict_frames(asked, seen, horizons, n_samples, seed)
        scale = kernel_scale(asked, predictions, fitted_to)
        probe = Probe(asked, seen, predictions, scale, horizons, grid)
        return predictions, Likelihood().landscape(probe)

    def maps(observation: Observation) -> Attribution | None:
        if not isinstance(view, ACTPolicy) or not view.data_schema.cameras:
            return None
        return _by_pixel(explain(METHOD, view, observation, TARGET))

    def side(seen: Batch) -> Side:
        predictions, landscape = answers(view, seen, calibration, seed)
        return Side(seen, predictions.point.cpu(), landscape, maps(seen.observation))

    here, there = side(batch), side(other)
    # Behind the mirrors residuals of demonstrations are mirrored, too: axes may change places.
    fitted_to = None if calibration is None else _reflect_predictions(calibration, outwards)
    predictions, landscape = answers(behind, other, fitted_to, seed)
    observation = other.observation
    for mirror in mirrors:
        observation = mirror.observation(observation)
    found = maps(observation)
    if found is not None:
        pictures = {name: _reflect_pictures(each, outwards) for name, each in found.maps.items()}
        found = replace(found, maps=pictures)
    return BothSides(
        seen=here,
        plain=there,
        flipped=Side(other, predictions.point.cpu(), landscape, found),
        redrawn=answers(view, batch, calibration, seed + 1)[1],
        mirrors=tuple(mirrors),
    )


def _reflect_predictions(predictions: Predictions, mirrors: Sequence[Mirror]) -> Predictions:
    for mirror in mirrors:
        predictions = replace(
            predictions,
            samples=mirror.vectors(predictions.samples),
            point=mirror.vectors(predictions.point),
            expert=mirror.vectors(predictions.expert),
        )
    return predictions


def _reflect_pictures(
    pictures: Float[Tensor, "*batch height width"], mirrors: Sequence[Mirror]
) -> Float[Tensor, "*batch row column"]:
    for mirror in mirrors:
        pictures = mirror.pictures(pictures)
    return pictures


def _by_pixel(found: Attribution) -> Attribution:
    """Spread maps over pixels: the cells of a mirrored picture may lie elsewhere."""
    maps = found.densities()
    return replace(found, maps=maps, cells_px=dict.fromkeys(maps, 1.0))
