"""A method on many frames, and what is said of it in numbers: shared by callback and commands."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from jaxtyping import Bool
from torch import Tensor, nn

from attention.attribution import Attribution
from attention.counterfactuals import CounterfactualEffects
from attention.faithfulness import (
    Faithfulness,
    counterfactual_agreement,
    deletion_insertion,
    map_ssim,
    object_scores,
    patch_agreement,
    randomised,
)
from attention.method import Method, Target
from policies.act import ACTPolicy
from policies.backbones import receptive_field_px
from policies.interface import Observation, PolicyView
from policies.tokens import TokenLayout

WEIGHTS_BYTES = 256 * 2**20
"""Attention weights that are kept at once, at most."""


def frames_together(view: PolicyView, batch_size: int) -> int:
    """Frames whose attention weights fit into memory: two cameras of 480 x 640 px are 602 tokens.

    Args:
        view: The policy.
        batch_size: Frames that are asked for.

    Returns:
        As many, or fewer; at least 1.
    """
    if not isinstance(view, ACTPolicy):
        return batch_size
    n_tokens = TokenLayout.of(view.network).n_tokens
    per_layer = 4 * view.hyper_parameters["n_heads"] * n_tokens**2
    per_frame = per_layer * max(len(view.network.encoder.layers), 1)
    return max(1, min(batch_size, WEIGHTS_BYTES // per_frame))


def explain(
    method: Method,
    view: PolicyView,
    observation: Observation,
    target: Target,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Attribution:
    """Explain frames batch by batch.

    Args:
        method: What explains.
        view: The policy, in eval mode.
        observation: Frames, on the policy's device.
        target: What is explained.
        batch_size: Frames that go through the network together; changes no result.
        advance: Called with the number of frames after each batch.

    Returns:
        On the CPU, in single precision.

    Raises:
        ValueError: If there is no frame, or as in :meth:`Method.attribute`.
    """
    method.check(view)
    target.check(view)
    n_frames = n_frames_of(observation)
    if not n_frames:
        raise ValueError("there is no frame to explain")
    step = frames_together(view, batch_size)
    parts = []
    for start in range(0, n_frames, step):
        rows = observation.rows(slice(start, start + step))
        parts.append(method.attribute(view, rows, target).cpu())
        if advance is not None:
            advance(len(parts[-1]))
    return Attribution.concatenate(parts)


def n_frames_of(observation: Observation) -> int:
    """Number of frames of an observation."""
    first = next(iter(observation.images.values()), observation.state)
    return 0 if first is None else len(first)


@dataclass(frozen=True)
class Evidence:
    """What maps can be held against, on the same frames; what is not known is None."""

    observation: Observation
    """On the policy's device."""
    occlusion: Attribution | None = None
    """Causal, hence the yardstick for all others."""
    masks: Mapping[str, Bool[Tensor, "batch height width"]] | None = None
    """Objects in the first camera."""
    effects: CounterfactualEffects | None = None
    """Of taking the objects away."""


def judge(
    view: PolicyView,
    methods: Mapping[str, Method],
    attributions: Mapping[str, Attribution],
    evidence: Evidence,
    target: Target,
    batch_size: int = 64,
    seed: int = 0,
    with_curves: bool = True,
    with_randomised: bool = True,
) -> dict[str, Faithfulness]:
    """Measure how true the maps of several methods are.

    Args:
        view: The policy.
        methods: By name; asked again about a copy of the policy that has learnt nothing.
        attributions: What they said, by the same names.
        evidence: Of the same frames.
        target: What was explained.
        batch_size: Pictures that go through the network together.
        seed: Of random orders and of the randomised copy.
        with_curves: Measure deletion and insertion: about 40 forward passes a map and frame.
        with_randomised: Compare with the randomised copy.

    Raises:
        ValueError: If frames, cameras or objects of the parts differ.
    """
    curves = {}
    if with_curves:
        curves = deletion_insertion(
            view, evidence.observation, attributions, target, seed=seed, batch_size=batch_size
        )
    # Without parameters of its own a policy cannot be randomised.
    copy = randomised(view, seed) if with_randomised and isinstance(view, nn.Module) else None
    found = {}
    for name, attribution in attributions.items():
        verdict = Faithfulness(
            method=name,
            curves=curves.get(name),
            completeness_error=attribution.completeness_error,
        )
        if evidence.occlusion is not None and name != evidence.occlusion.method:
            agreement = patch_agreement(attribution, evidence.occlusion)
            verdict = replace(verdict, spearman_occlusion=agreement)
        if evidence.masks:
            verdict = replace(verdict, objects=object_scores(attribution, evidence.masks))
            if evidence.effects is not None:
                verdict = replace(
                    verdict,
                    counterfactual=counterfactual_agreement(
                        attribution, evidence.masks, evidence.effects
                    ),
                )
        if copy is not None:
            assert isinstance(copy, PolicyView)
            other = explain(methods[name], copy, evidence.observation, target, batch_size)
            verdict = replace(verdict, ssim_randomised=map_ssim(attribution, other))
        found[name] = verdict
    return found


def numbers(attribution: Attribution) -> dict[str, float]:
    """What one method says of some frames, on average.

    Returns:
        ``share_<input>`` for each kind of input, ``entropy_nats`` over the cells of the pictures,
        and ``concentration``: 0 where all cells count alike, 1 where a single one counts.
    """
    values = {f"share_{name}": float(part.mean()) for name, part in attribution.shares().items()}
    if attribution.maps:
        entropy = float(attribution.entropy_nats().mean())
        uniform = attribution.uniform_nats()
        values["entropy_nats"] = entropy
        if uniform > 0:
            values["concentration"] = 1 - entropy / uniform
    return values


def effect_numbers(effects: CounterfactualEffects) -> dict[str, float]:
    """Effects of objects, on average.

    Returns:
        ``effect_<object>_px``, ``share_<object>``, ``sensitivity_<pose parameter>`` and, where
        recorded pictures were compared, ``rerender_px``.
    """
    values = {f"effect_{name}_px": float(px.mean()) for name, px in effects.effect_px.items()}
    shares = effects.shares.mean(0).tolist()
    values |= {
        f"share_{name}": share for name, share in zip(effects.effect_px, shares, strict=True)
    }
    values |= {
        f"sensitivity_{name}": float(size.mean()) for name, size in effects.sensitivity.items()
    }
    if effects.rerender_px is not None:
        values["rerender_px"] = float(effects.rerender_px.mean())
    return values


def resolution_note(view: PolicyView) -> str:
    """Say in one line how fine a map of tokens can be; empty for policies that are no ACT."""
    if not isinstance(view, ACTPolicy) or view.network.backbone is None:
        return ""
    stride, field = view.network.token_stride, receptive_field_px(view.network.backbone)
    largest = max(max(size) for size in view.data_schema.cameras.values())
    # From its own place to every corner.
    sees = "the whole picture" if field >= 2 * largest else f"{field} px around it"
    return f"a token is a cell of {stride} px and sees {sees}"
