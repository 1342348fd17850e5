"""Methods that follow gradients: relevancy, Grad-CAM, integrated gradients.

All use ``torch.autograd.grad`` towards inputs or activations, so that neither gradients nor flags
of the policy's parameters change.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from attention.attribution import Attribution
from attention.baseline import Baseline, baseline_pictures
from attention.capture import capture_attention
from attention.maps import token_attribution
from attention.method import ACTMethod, Target, explained_actions
from policies.act import ACTPolicy, ObservationTokens
from policies.backbones import to_unit_range
from policies.interface import Observation, PolicyView
from policies.tokens import ENVIRONMENT_STATE, STATE, TokenLayout

PASS_PIXELS = 2**19
"""Pixels whose activations are kept at once, about: half a gigabyte of a ResNet-18's."""
CROWDING = 3.0
"""Power by which the nodes of integrated gradients crowd around the faintest picture."""
CONTRAST_WEIGHT = 1 / 16
"""What a picture's contrast adds to its faintness, beside its mean colour."""
MAX_COMPLETENESS_ERROR = 0.03
"""Above it, integrated gradients divide every interval of a frame by three, where they may."""


class Relevancy(ACTMethod):
    """Cross-attention and self-attention, weighted by what they do to the action.

    Chefer et al. 2021 (arXiv:2103.15679): for a coordinate y of the action, ``Abar = mean_h
    relu(dy/dA * A)``; over the encoder's layers ``R <- R + Abar R`` from the identity; the map is
    ``Abar_x[k, :] R`` with the last cross-attention. Mean over the explained coordinates.
    """

    name = "relevancy"

    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """One forward pass behind the backbone, one backward pass for every output."""
        policy = self.policy(view)
        target.check(policy)
        network = policy.network
        with torch.no_grad():
            tokens = policy.encode_observation(observation)
        with torch.inference_mode(False), torch.enable_grad():
            # A start for the graph: weights only depend on what requires a gradient.
            start = tokens.tokens.detach().clone().requires_grad_()
            with capture_attention(network, differentiable=True) as capture:
                # As explained_actions: the state of relative actions is not added.
                actions = policy.normaliser.action.unnormalise(
                    network.decode(
                        ObservationTokens(start, tokens.positions.clone()),
                        network.prior_mean(start),
                        target.queries,
                    )
                )
            outputs = target.aggregate(target.coordinates(actions))
            weights = capture.weights
            layers = [*weights.encoder(), weights.cross()[-1]]
            relevance = torch.zeros_like(layers[-1][:, 0, 0])
            for number in range(outputs.shape[1]):
                gradients = torch.autograd.grad(
                    outputs[:, number].sum(),
                    layers,
                    retain_graph=number + 1 < outputs.shape[1],
                )
                positive = [
                    reduce(
                        (slope * layer).relu(),
                        "batch head query token -> batch query token",
                        "mean",
                    ).detach()
                    for slope, layer in zip(gradients, layers, strict=True)
                ]
                # Queries that are not explained have no gradient, hence nothing to add.
                rolled = reduce(positive[-1], "batch query token -> batch token", "sum")
                for layer in reversed(positive[:-1]):
                    rolled = rolled + torch.einsum("bq,bqt->bt", rolled, layer)
                relevance += rolled / outputs.shape[1]
        layout = TokenLayout.of(network)
        return token_attribution(self.name, layout, relevance, target.queries)


class GradCAM(ACTMethod):
    """Features of the backbone, weighted by what they do to the action (Selvaraju et al. 2017).

    ``relu(sum_c alpha_c A_c)`` over the token grid, ``alpha_c`` the spatial mean of dy/dA_c (eq. 1
    and 2), each camera by itself, mean over the explained coordinates. It says nothing of states.

    Own code: captum's LayerGradCam keeps the last call of a layer, and the backbone runs once for
    each camera.
    """

    name = "grad_cam"

    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """One forward pass, one backward pass for every output."""
        policy = self.policy(view)
        target.check(policy)
        parts = [self._maps(policy, piece, target) for piece in _pieces(observation, PASS_PIXELS)]
        layout = TokenLayout.of(policy.network)
        maps = {name: torch.cat([part[name] for part in parts]) for name in layout.image_sizes}
        return Attribution(
            method=self.name,
            queries=target.queries,
            maps=maps,
            cells_px={name: float(layout.token_stride) for name in maps},
            image_sizes=dict(layout.image_sizes),
            vectors={},
            dimensions={},
        )

    def _maps(
        self, policy: ACTPolicy, observation: Observation, target: Target
    ) -> dict[str, Float[Tensor, "batch row column"]]:
        backbone = policy.network.backbone
        assert backbone is not None
        features: list[Tensor] = []

        def begin(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
            """Let the graph begin here; the backbone needs none."""
            features.append(output.detach().requires_grad_())
            return features[-1]

        with torch.inference_mode(False), torch.enable_grad():
            # One call of the backbone for each camera, in token order.
            handle = backbone.register_forward_hook(begin)
            try:
                actions = explained_actions(policy, _copied(observation), target.queries)
            finally:
                handle.remove()
            outputs = target.aggregate(target.coordinates(actions))
            maps = [torch.zeros_like(each[:, 0]) for each in features]
            for number in range(outputs.shape[1]):
                gradients = torch.autograd.grad(
                    outputs[:, number].sum(),
                    features,
                    retain_graph=number + 1 < outputs.shape[1],
                )
                for found, feature, slope in zip(maps, features, gradients, strict=True):
                    alpha = reduce(slope, "batch channel row column -> batch channel", "mean")
                    weighed = torch.einsum("bc,bcij->bij", alpha, feature.detach())
                    found += weighed.relu() / outputs.shape[1]
        return {
            name: found.detach()
            for name, found in zip(policy.data_schema.cameras, maps, strict=True)
        }


class IntegratedGradients(ACTMethod):
    """Gradients on the way from an empty observation to this one (Sundararajan et al. 2017).

    Pictures and states go along together, so that their attributions add up to the difference of
    the action between the ends; ``completeness_error`` says how far they miss it, as a share of it:
    ``sum_outputs |sum of attributions - difference| / sum_outputs |difference|``.

    Relevance of a pixel: ``|sum over RGB|`` of its attributions; of a state: the sum of magnitudes
    over its dimensions; each the mean over outputs. ``dimensions`` keeps the sign.

    The rule is the midpoint rule, with nodes that crowd around the point of the way where the
    picture is faintest in the network's units: there a normalising network (GroupNorm, or a frozen
    norm with small variance) is nearly discontinuous, since it lifts a faint picture to full
    contrast. captum has no such nodes; with evenly spaced ones the rule is captum's
    ``riemann_middle``. Frames whose completeness error stays above 3 % get three times as many
    nodes, and again, which uses every gradient that is already known.

    Args:
        n_steps: Nodes, at first.
        baseline: The empty picture: the mean colour, or black. States start from their mean.
        max_steps: Nodes for one frame, at most: ``n_steps`` for no more than those, nine times as
            many when None.

    Raises:
        ValueError: If ``n_steps`` is not positive or above ``max_steps``, or the baseline unknown.
    """

    # Completeness error in percent, summed over 6 to 10 frames before it is divided: 50 even nodes,
    # 50 crowded ones, and after refinement (in brackets nodes per frame, on average).
    #                                                 from the mean         from black
    # small CNN, 48 px, trained on scripted PushT   20.8  2.3  1.4 (90)    3.6  2.0  1.1 (130)
    # small CNN, 48 px, trained on human PushT      22.9  4.6  1.3 (160)  15.4  3.3  1.8 (230)
    # ResNet-18, GroupNorm, 96 px, human PushT      33.9  2.4  1.8 (150)  18.5  4.2  1.6 (100)
    # ResNet-18, frozen norms, random weights        4.7  0.7  0.7 (50)    8.8  5.3  1.1 (133)
    # One frame of 64 stayed above 3 %. Maps settle earlier than sums, in which most cancels: 50
    # crowded nodes are within 2 % (L1, small CNN) of the map that 1200 nodes give.

    name = "integrated_gradients"

    def __init__(
        self, n_steps: int = 50, baseline: Baseline = "mean", max_steps: int | None = None
    ):
        if n_steps < 1:
            raise ValueError(f"n_steps {n_steps}: give at least 1")
        if max_steps is not None and max_steps < n_steps:
            raise ValueError(f"max_steps {max_steps}: give at least n_steps {n_steps}")
        if baseline not in ("mean", "black"):
            raise ValueError(f"baseline {baseline!r}: give mean or black")
        self.n_steps = n_steps
        self.max_steps = 9 * n_steps if max_steps is None else max_steps
        self.baseline: Baseline = baseline

    def attribute(self, view: PolicyView, observation: Observation, target: Target) -> Attribution:
        """At least ``n_steps`` forward passes, each with one backward pass for every output."""
        policy = self.policy(view)
        target.check(policy)
        seen = _Inputs.of(policy, observation).observation()
        # A colour that bytes can hold: at the exact mean, which is the network's zero, GroupNorm
        # without biases is discontinuous, and no number of nodes would do.
        empty = {
            camera: (pictures * 255).round() / 255
            for camera, pictures in baseline_pictures(policy, seen, self.baseline).items()
        }
        start = _Inputs.of(
            policy, Observation(empty, observation.state, observation.environment_state)
        )
        start = start.with_mean_states(policy)
        parts = []
        first = 0
        for piece in _pieces(observation, PASS_PIXELS):
            inputs = _Inputs.of(policy, piece)
            rows = slice(first, first + len(inputs))
            first += len(inputs)
            parts.append(self._piece(policy, start.rows(rows), inputs, target))
        return Attribution.concatenate(parts)

    def _piece(
        self, policy: ACTPolicy, start: "_Inputs", end: "_Inputs", target: Target
    ) -> Attribution:
        edges = crowded_edges(_faintest(policy, start, end), self.n_steps)
        nodes, widths = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=1)

        def outputs(inputs: "_Inputs") -> Float[Tensor, "batch output"]:
            actions = explained_actions(policy, inputs.observation(), target.queries)
            return target.aggregate(target.coordinates(actions))

        with torch.inference_mode(False), torch.no_grad():
            difference = outputs(end) - outputs(start)
        attributions = _integrate(outputs, start, end, nodes, widths)
        rows = torch.arange(len(end), device=nodes.device)
        while True:
            error = _completeness_error(attributions, difference)
            again = error[rows] > MAX_COMPLETENESS_ERROR
            if not again.any() or 3 * nodes.shape[1] > self.max_steps:
                return self._attribution(policy, end, attributions, target, error)
            rows, nodes, widths = rows[again], nodes[again], widths[again] / 3
            # The middle of an interval is that of its middle third too: nothing is done twice.
            outer = torch.cat([nodes - widths, nodes + widths], dim=1)
            added = _integrate(
                outputs, start.rows(rows), end.rows(rows), outer, widths.repeat(1, 2)
            )
            for whole, part in zip(attributions, added, strict=True):
                whole[:, rows] = whole[:, rows] / 3 + part
            nodes, widths = torch.cat([nodes, outer], dim=1), widths.repeat(1, 3)

    def _attribution(
        self,
        policy: ACTPolicy,
        inputs: "_Inputs",
        attributions: Sequence[Tensor],
        target: Target,
        error: Float[Tensor, " batch"],
    ) -> Attribution:
        maps, vectors, dimensions = {}, {}, {}
        for name, parts in zip(inputs.names, attributions, strict=True):
            if name in policy.data_schema.cameras:
                pixels = reduce(
                    parts, "output batch rgb row column -> output batch row column", "sum"
                )
                maps[name] = pixels.abs().mean(0)
            else:
                vectors[name] = parts.abs().sum(-1).mean(0)
                dimensions[name] = parts.mean(0)
        return Attribution(
            method=self.name,
            queries=target.queries,
            maps=maps,
            cells_px=dict.fromkeys(maps, 1.0),
            image_sizes=dict(policy.data_schema.cameras),
            vectors=vectors,
            dimensions=dimensions,
            completeness_error=error,
        )


class _Inputs:
    """Everything that a policy reads, as floats that gradients can reach."""

    def __init__(self, names: Sequence[str], values: Sequence[Tensor]):
        self.names = tuple(names)
        self.values = list(values)

    @classmethod
    def of(cls, policy: ACTPolicy, observation: Observation) -> "_Inputs":
        """Pictures in 0..1 in token order, then states, in the policy's precision.

        Pictures in single precision at least: sums over many nodes are made of them.
        """
        dtype = policy.network.action_head.weight.dtype
        exact = torch.promote_types(dtype, torch.float32)
        named = {
            name: to_unit_range(observation.images[name], exact)
            for name in policy.data_schema.cameras
        }
        if policy.normaliser.state is not None and observation.state is not None:
            named[STATE] = observation.state.to(dtype)
        if (
            policy.normaliser.environment_state is not None
            and observation.environment_state is not None
        ):
            named[ENVIRONMENT_STATE] = observation.environment_state.to(dtype)
        return cls(list(named), list(named.values()))

    def __len__(self) -> int:
        return len(self.values[0])

    def rows(self, index: slice | Int[Tensor, " row"]) -> "_Inputs":
        return _Inputs(self.names, [value[index] for value in self.values])

    def with_mean_states(self, policy: ACTPolicy) -> "_Inputs":
        """Put the mean of the training split, or the middle of the range, for the states."""
        features = {
            STATE: policy.normaliser.state,
            ENVIRONMENT_STATE: policy.normaliser.environment_state,
        }
        values = []
        for name, value in zip(self.names, self.values, strict=True):
            feature = features.get(name)
            values.append(
                value if feature is None else feature.offset.to(value).expand_as(value).clone()
            )
        return _Inputs(self.names, values)

    def towards(self, end: "_Inputs", share: Float[Tensor, " batch"]) -> "_Inputs":
        """A point of the way to ``end``, where a graph begins."""
        values = [
            (before + _along(share, before) * (after - before)).detach().requires_grad_()
            for before, after in zip(self.values, end.values, strict=True)
        ]
        return _Inputs(self.names, values)

    def observation(self) -> Observation:
        named = dict(zip(self.names, self.values, strict=True))
        state, environment_state = named.pop(STATE, None), named.pop(ENVIRONMENT_STATE, None)
        return Observation(named, state, environment_state)


def _integrate(
    outputs: Callable[[_Inputs], Tensor],
    start: _Inputs,
    end: _Inputs,
    nodes: Float[Tensor, "batch node"],
    widths: Float[Tensor, "batch node"],
) -> list[Tensor]:
    """Sum gradients over nodes, times the way that each input goes.

    Returns:
        For each input the attributions of every output, (output, batch, ...).
    """
    sums: list[Tensor] = []
    for share, width in zip(nodes.unbind(1), widths.unbind(1), strict=True):
        with torch.inference_mode(False), torch.enable_grad():
            between = start.towards(end, share)
            found = outputs(between).sum(0)
            gradients = [
                torch.autograd.grad(output, between.values, retain_graph=number + 1 < len(found))
                for number, output in enumerate(found)
            ]
        slopes = [torch.stack(of_outputs) for of_outputs in zip(*gradients, strict=True)]
        sums = sums or [torch.zeros_like(slope) for slope in slopes]
        for total, slope in zip(sums, slopes, strict=True):
            total += slope * _along(width, slope[0])
    return [
        total * (after - before)
        for total, before, after in zip(sums, start.values, end.values, strict=True)
    ]


def _completeness_error(
    attributions: Sequence[Tensor], difference: Float[Tensor, "batch output"]
) -> Float[Tensor, " batch"]:
    """``sum_outputs |sum of attributions - difference| / sum_outputs |difference|``."""
    reached = torch.stack([parts.flatten(2).sum(-1) for parts in attributions]).sum(0)
    missed = (rearrange(reached, "output batch -> batch output") - difference).abs().sum(1)
    return missed / difference.abs().sum(1).clamp_min(1e-12)


def crowded_edges(
    centre: Float[Tensor, " batch"], n_steps: int, power: float = CROWDING
) -> Float[Tensor, "batch edge"]:
    """Edges from 0 to 1, spaced evenly in ``u`` of ``centre + c sign(u - u0) |u - u0|^power``.

    Args:
        centre: Where they crowd, 0..1, for each frame.
        n_steps: Intervals.
        power: 1 for even spacing.
    """
    # Both ends are reached: c u0^power = centre and c (1 - u0)^power = 1 - centre.
    left, right = centre ** (1 / power), (1 - centre) ** (1 / power)
    middle = (left / (left + right))[:, None]
    scale = (left + right)[:, None] ** power
    u = torch.linspace(0, 1, n_steps + 1, dtype=centre.dtype, device=centre.device) - middle
    edges = centre[:, None] + scale * u.sign() * u.abs() ** power
    edges[:, 0], edges[:, -1] = 0, 1
    return edges


def _faintest(policy: ACTPolicy, start: _Inputs, end: _Inputs) -> Float[Tensor, " batch"]:
    """The share of the way at which the pictures, in the network's units, are smallest.

    Contrast counts little beside the mean colour: where that vanishes, a norm divides by contrast.
    """
    slope = torch.zeros(len(end), device=end.values[0].device, dtype=end.values[0].dtype)
    length = torch.zeros_like(slope)
    for name, before, after in zip(start.names, start.values, end.values, strict=True):
        if name in policy.data_schema.cameras:
            feature = policy.normaliser.image(name)
            origin, goal = (
                rearrange(
                    feature.normalise_image(each), "batch rgb row column -> batch rgb (row column)"
                )
                for each in (before, after)
            )
            way = goal.mean(-1) - origin.mean(-1)
            slope -= (origin.mean(-1) * way).sum(1)
            length += (way.square() + CONTRAST_WEIGHT * goal.var(-1, correction=0)).sum(1)
    return (slope / length.clamp_min(1e-12)).clamp(0, 1)


def _along(share: Float[Tensor, " batch"], like: Tensor) -> Tensor:
    """One number for each frame, broadcast over the rest."""
    return rearrange(share.to(like), f"batch -> batch{' 1' * (like.ndim - 1)}")


def _pieces(observation: Observation, pixels: int) -> Iterator[Observation]:
    """Frames in groups of about so many pixels."""
    first = next(iter(observation.images.values()))
    per_frame = sum(images[0].numel() // 3 for images in observation.images.values())
    together = max(1, pixels // per_frame)
    for start in range(0, len(first), together):
        yield observation.rows(slice(start, start + together))


def _copied(observation: Observation) -> Observation:
    """Tensors of inference mode cannot take part in a graph; their copies can."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    return Observation(
        {name: images.clone() for name, images in observation.images.items()},
        copy(observation.state),
        copy(observation.environment_state),
    )
