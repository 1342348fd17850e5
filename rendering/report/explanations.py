"""The words of a report: how to read each picture, and what each number means.

Everything here is data. A new diagnostic adds a :class:`Picture` for what it draws, a line to
``MEANINGS`` for each number, and, where a number has something to be compared with, a
:class:`Reference`. A name without an entry still shows, as it was logged.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Trust:
    """A number that says whether a picture may be believed at a checkpoint."""

    pattern: str
    """Whole name of the number; a group ``of`` makes one row of each of its values."""
    label: str
    """Head of the column."""
    rule: str
    """What a trustworthy value looks like, in two or three words."""
    above: float | None = None
    """Values that are not above this are marked."""
    within: float | None = None
    """Marked when the interval of the number leaves this out."""


@dataclass(frozen=True)
class Picture:
    """How to read what is drawn under one name."""

    pattern: str
    """Whole name of the picture, video or table."""
    title: str
    reading: str
    """One sentence."""
    trust: tuple[Trust, ...] = ()


@dataclass(frozen=True)
class Reference:
    """What a number is compared with: another number, or a constant."""

    pattern: str
    """Whole name of the number."""
    label: str
    metric: str | None = None
    """Name of the other number; may use the groups of ``pattern``."""
    value: float | None = None
    """The constant, when there is no other number."""


@dataclass(frozen=True)
class Headline:
    """A number that says in one glance how a run went."""

    pattern: str
    """Whole name of the number."""
    label: str
    """May use the groups of ``pattern``."""
    reading: str
    baselines: tuple[tuple[str, str], ...] = ()
    """Label and name of what to compare it with; names may use the groups of ``pattern``."""


SECTIONS = {
    "rollout": ("Rollouts", "The policy acting on fixed seeds, the same at every checkpoint."),
    "val": ("Validation", "Held-out episodes, measured with the weights that are saved."),
    "train": ("Training", "Of single batches, in normalised units unless the name has a unit."),
    "landscape": (
        "Landscapes",
        "What the policy would do everywhere on the board, scored on demonstrated actions.",
    ),
    "attention": ("Attention", "Where the policy looks, and tests of whether the maps are true."),
    "features": (
        "Features",
        "What a sparse autoencoder finds in the policy's activations on held-out episodes.",
    ),
    "diagnostics": ("Diagnostics", "What looking costs, in seconds and as a share of the time."),
    "resources": (
        "Resources",
        "What the run holds on its machine; a line that keeps rising is a leak.",
    ),
    "other": ("Other", "Everything else that was logged."),
}
"""Key to title and one sentence, in the order of the page."""

SECTION_OF_PREFIX = {
    "rollout": "rollout",
    "untrained": "rollout",
    "transfer": "rollout",
    "val": "val",
    "test": "val",
    "baseline": "val",
    "train": "train",
    "landscape": "landscape",
    "latent": "landscape",
    "calib": "landscape",
    "attention": "attention",
    "counterfactual": "attention",
    "features": "features",
    "diagnostics": "diagnostics",
    "resources": "resources",
}
"""First word of a name to its section."""

_ROLLOUTS = (
    Trust(r"rollout/mean_max_coverage", "coverage", "interval"),
    Trust(r"rollout/mean_max_(?!coverage|overlap|reward)[a-z]+", "score", "interval"),
    Trust(r"rollout/success", "success", "interval"),
    Trust(r"rollout/n_episodes", "episodes", "more = narrower"),
    Trust(r"rollout/clipped_share", "clipped actions", "0 = in range"),
)
_OTHER_ROLLOUTS = (
    Trust(r"(?P<of>rollout_\w+)/mean_max_[a-z]+", "score", "interval"),
    Trust(r"(?P<of>rollout_\w+)/success", "success", "interval"),
)
_TRANSFER = (
    Trust(r"transfer/(?P<of>arm\d+(?:_flipped)?)/mean_max_coverage", "coverage", "interval"),
    Trust(r"transfer/(?P<of>arm\d+(?:_flipped)?)/success", "success", "interval"),
)
_OTHER_TRANSFERS = (
    Trust(r"(?P<of>transfer_\w+/arm\d+(?:_flipped)?)/mean_max_coverage", "coverage", "interval"),
    Trust(r"(?P<of>transfer_\w+/arm\d+(?:_flipped)?)/success", "success", "interval"),
)
_LANDSCAPES = (
    Trust(r"landscape/val/(?P<of>k\d+)/nll", "NLL, nats", "lower"),
    Trust(r"landscape/val/(?P<of>k\d+)/skill_vs_agent", "skill", "> 0", above=0.0),
    Trust(r"landscape/val/(?P<of>k\d+)/c80", "c80", "holds 0.80", within=0.8),
    Trust(r"landscape/val/(?P<of>k\d+)/ks", "KS", "near 0"),
    Trust(r"landscape/val/(?P<of>k\d+)/sample_gap", "sample gap", "< 0.05"),
)
_ATTENTION = (
    Trust(r"attention/(?P<of>[^/]+)/deletion_ratio", "deletion", "> 1", above=1.0),
    Trust(r"attention/(?P<of>[^/]+)/insertion_ratio", "insertion", "> 1", above=1.0),
    Trust(r"attention/(?P<of>[^/]+)/spearman_occlusion", "like occlusion", "high", above=0.0),
    Trust(r"attention/(?P<of>[^/]+)/ssim_randomised", "SSIM randomised", "far below 1"),
    Trust(r"attention/(?P<of>[^/]+)/share_state", "share of state", "beside the map"),
)
_FEATURES = (
    Trust(r"(?:val|features)/fvu", "FVU", "low"),
    Trust(r"features/action_score", "action score", "near 1"),
    Trust(r"(?:val|features)/l0", "L0", "few"),
    Trust(r"(?:val|features)/dead_fraction", "dead share", "low"),
)

PICTURES = (
    Picture(
        r"rollout/video",
        "Rollouts",
        "The first seeds side by side, from their start to success or the time limit; the caption "
        "counts steps and the score.",
        _ROLLOUTS,
    ),
    Picture(
        r"rollout_\w+/video",
        "Rollouts, another way of acting",
        "The same seeds, acting in the way that its name says.",
        _OTHER_ROLLOUTS,
    ),
    Picture(
        r"transfer/video",
        "An arm it has never seen",
        "A row per trial, from the same start: the arm it was trained for, its mirror image with "
        "the policy as it is, and with the mirror in between, where it sees its own world: it does "
        "as on the left until rounding, or noise that is drawn anew, parts them.",
        _TRANSFER,
    ),
    Picture(
        r"transfer_\w+/video",
        "An arm it has never seen, another way of acting",
        "The same trials, acting in the way that its name says.",
        _OTHER_TRANSFERS,
    ),
    Picture(
        r"landscape/strip",
        "Action landscape",
        "Each row is a held-out frame: bright cells are actions the policy finds likely, the red "
        "cross is what the demonstrator did, the star what the policy predicts; a cross outside "
        "the dotted line (95 %) is a surprise.",
        _LANDSCAPES,
    ),
    Picture(
        r"landscape/video",
        "Landscape along an episode",
        "The same along a whole recorded episode: a landscape that splits in two shows a policy "
        "that has not decided.",
        _LANDSCAPES,
    ),
    Picture(
        r"landscape/strip_.+",
        "Action landscape, another plane",
        "The same over two other dimensions of the action.",
        _LANDSCAPES,
    ),
    Picture(
        r"landscape/video_.+",
        "Landscape along an episode, another plane",
        "The same over two other dimensions of the action.",
        _LANDSCAPES,
    ),
    Picture(
        r"landscape/marginals",
        "Every dimension by itself",
        "One instant, a panel for each number of the action, each on its own scale: the darker, "
        "the smaller the region that holds 50, 80 or 95 % of the mass; red is what the "
        "demonstrator did, the star what the policy predicts.",
        _LANDSCAPES,
    ),
    Picture(
        r"landscape/marginals_along",
        "Every dimension along an episode",
        "A band for each number of the action, time to the right: bright values are likely, the "
        "red line is the demonstration. A red line outside of the bright part is a surprise.",
        _LANDSCAPES,
    ),
    Picture(
        r"landscape/projection(_strip)?",
        "Where actions lead",
        "Over what each camera saw, for each end effector: the outlines hold 50 and 80 % of where "
        "the policy would have it some steps later, the star is its prediction, the red cross "
        "the demonstration.",
        _LANDSCAPES,
    ),
    Picture(
        r"attention/strip",
        "Where it looks",
        "A row per method, bright where it weighs most, each frame on its own scale; the bar "
        "beside a frame splits the weight between picture, state and latent. Believe only a "
        "method that beats chance in the table.",
        _ATTENTION,
    ),
    Picture(
        r"attention/video.*",
        "Attention along an episode",
        "One method along a recorded episode, over what the camera saw: does the weight follow "
        "the T and the agent, or stay where it is?",
        _ATTENTION,
    ),
    Picture(
        r"features/strip",
        "What features stand for",
        "Each row is one feature on the held-out frames where it is strongest, coloured by its "
        "activation; the title names the simulator quantity it tells best, chosen on other "
        "episodes than those it is measured on.",
        _FEATURES,
    ),
    Picture(
        r"features/density",
        "How often features fire",
        "Latents by the share of vectors they fire on: a hump at the far left is dead, one at the "
        "far right says nothing in particular.",
        _FEATURES,
    ),
    Picture(
        r"landscape/episodes",
        "Landscapes by episode",
        "One row per held-out episode and chunk step k: sort by nll to find the episodes the "
        "policy understands least.",
    ),
    Picture(
        r"features/births",
        "When features were born",
        "One row per live latent: the checkpoint since which its direction has persisted, the "
        "share of vectors it fires on, and the quantity it tells, if any.",
    ),
)

CHANCE = "chance"
REFERENCES = (
    Reference(r"rollout/(?P<name>.+)", "untrained", r"untrained/\g<name>"),
    Reference(r"rollout_\w+/(?P<name>.+)", "rollout", r"rollout/\g<name>"),
    Reference(
        r"(?P<arm>transfer(?:_\w+)?/arm\d+)/(?P<name>.+)",
        "with the flip",
        r"\g<arm>_flipped/\g<name>",
    ),
    Reference(
        r"(?P<run>transfer(?:_\w+)?)/(?:arm\d+_)?equivariance_px",
        "drawn anew",
        r"\g<run>/redrawn_px",
    ),
    Reference(r"transfer(?:_\w+)?/(?:arm\d+_)?equivariance_px", "respects the mirror", value=0.0),
    Reference(
        r"val/first_action_l1_(?P<unit>[a-z]+)",
        "hold position",
        r"baseline/hold_position_l1_\g<unit>",
    ),
    Reference(
        r"features/rollout_spliced_(?P<name>.+)", "clean", r"features/rollout_clean_\g<name>"
    ),
    Reference(r"features/sae_l1", "clean", "features/clean_l1"),
    Reference(r"attention/[^/]+/(deletion|insertion)_ratio", CHANCE, value=1.0),
    Reference(r"attention/[^/]+/lift_(?!.*_ceiling)\w+", "prefers nothing", value=1.0),
    Reference(r"features/auroc_\w+", CHANCE, value=0.5),
    Reference(r"landscape/[^/]+/[^/]+/c50", "calibrated", value=0.5),
    Reference(r"landscape/[^/]+/[^/]+/c80", "calibrated", value=0.8),
    Reference(r"landscape/[^/]+/[^/]+/c95", "calibrated", value=0.95),
    Reference(r"landscape/[^/]+/[^/]+/skill_vs_agent", "agent's position", value=0.0),
)

FAMILIES = (
    r"transfer(?:_\w+)?/(?P<of>arm\d+(?:_flipped)?)/(?P<rest>.+)",
    r"attention/(?P<of>[^/]+)/(?P<rest>.+)",
    r"(?P<start>landscape/[^/]+/k\d+)/(?P<of>[^/]+)(?P<rest>/[^/]+)",
    r"(?P<start>.+)/(?P<of>k\d+)(?P<rest>/.+)?",
)
"""Numbers that differ in the group ``of`` only share a chart."""

NO_CURVES = (r"epoch", r"(.+[/_])?n_episodes")
"""Numbers that stand in the tables only."""

HEADLINES = (
    Headline(
        "rollout/mean_max_coverage",
        "mean max coverage",
        "Best coverage of an episode, mean over episodes.",
        (("untrained", "untrained/mean_max_coverage"),),
    ),
    Headline(
        r"rollout/mean_max_(?P<score>(?!coverage|overlap|reward)[a-z]+)",
        r"mean max \g<score>",
        "Best score of an episode, mean over episodes.",
        (("untrained", r"untrained/mean_max_\g<score>"),),
    ),
    Headline(
        "rollout/success",
        "success",
        "Share of episodes that are solved, at the last threshold.",
        (("untrained", "untrained/success"),),
    ),
    Headline(
        r"val/first_action_l1_(?P<unit>[a-z]+)",
        r"first action error, \g<unit>",
        "Action to execute now against the demonstration, held-out episodes.",
        (
            ("hold position", r"baseline/hold_position_l1_\g<unit>"),
            ("mean action", r"baseline/mean_action_l1_\g<unit>"),
        ),
    ),
    Headline("val/loss", "validation loss", "The training loss on held-out episodes."),
    Headline(
        "landscape/val/k8/skill_vs_agent",
        "landscape skill at k = 8, nats",
        "Likelihood of the demonstration above that of a density at the agent's position; 0 is no "
        "skill.",
    ),
    Headline(
        "landscape/val/k8/c80",
        "calibration c80 at k = 8",
        "Share of demonstrations inside the 80 % region; 0.80 is calibrated.",
    ),
    Headline(
        "attention/relevancy/deletion_ratio",
        "deletion ratio of relevancy",
        "Above 1, the map finds what the action depends on better than chance.",
    ),
    Headline(
        "attention/integrated_gradients/deletion_ratio",
        "deletion ratio of integrated gradients",
        "Above 1, the map finds what the action depends on better than chance.",
    ),
    Headline("val/fvu", "FVU", "Variance that reconstructions miss, held-out vectors."),
    Headline("features/fvu", "features: FVU", "Variance that reconstructions miss, held-out."),
    Headline(
        "features/action_score",
        "features: action score",
        "1 where the policy acts the same on reconstructions, 0 where they keep no more than the "
        "mean activation does.",
    ),
    Headline(
        "features/rollout_spliced_mean_max_coverage",
        "coverage on reconstructions",
        "The policy acting through the autoencoder, from equal seeds.",
        (("clean", "features/rollout_clean_mean_max_coverage"),),
    ),
)

MEANINGS = (
    (
        r"transfer(?:_\w+)?/arm\d+_flipped/success",
        "Success of an unseen arm with the mirror in between.",
    ),
    (
        r"transfer(?:_\w+)?/redrawn_px",
        "Distance of two chunks drawn for one observation, median, px.",
    ),
    (
        r"transfer(?:_\w+)?/arm\d+_flipped/mean_max_coverage",
        "Best coverage of an unseen arm with the mirror in between; mean over episodes.",
    ),
    (
        r"transfer(?:_\w+)?/(?:arm\d+_)?equivariance_px",
        "Distance of the action in the mirror from the mirrored action, median, px.",
    ),
    (
        r"(train|val|test)/loss",
        "What is minimised: of one batch; of held-out data in val and test.",
    ),
    (r"(train|val|test)/l1", "Mean absolute error of normalised actions, z from the posterior."),
    (r"(.+/)?kl_nats", "KL divergence of the posterior from the prior, nats; 0 is collapsed."),
    (r"train/grad_norm", "Norm of the gradient before clipping."),
    (r"train/lr", "Learning rate."),
    (r".+/reconstruction_l1_[a-z]+(/k\d+)?", "Action error with z from the posterior."),
    (r"(val|test)/l1_[a-z]+(/k\d+)?", "What the policy would do (z = 0) against demonstrations."),
    (r".+/first_action_l1_[a-z]+", "Error of the action to execute now."),
    (r"baseline/hold_position_l1_[a-z]+", "Error of staying where the agent is."),
    (r"baseline/mean_action_l1_[a-z]+", "Error of the mean action of the training split."),
    (r".*success(_\d\.\d+)?", "Share of episodes whose best score is beyond the threshold."),
    (r".*mean_max_coverage", "Best coverage of an episode, mean over episodes."),
    (r".*mean_max_overlap", "Coverage over 0.95, at most 1; mean of the best of each episode."),
    (r".*mean_final_coverage", "Coverage at the end of an episode, mean over episodes."),
    (r".*mean_sum_reward", "Sum of rewards of an episode, mean over episodes."),
    (r".*mean_n_steps", "Length of an episode in steps, mean over episodes."),
    (r".*clipped_share", "Share of actions that had to be clipped to the task's range."),
    (r".*n_episodes", "Episodes behind these numbers."),
    (
        r"landscape/.+/nll",
        "-log p at the demonstrated action, nats per unit of the axes; lower is better.",
    ),
    (r"landscape/.+/nll_z0", "NLL with one kernel at z = 0."),
    (
        r"landscape/.+/nll_frozen",
        "NLL with b at 2 % of each axis (PushT: 10 px): free of drift through recalibration.",
    ),
    (r"landscape/.+/z_value", "What samples of z add over z = 0, nats."),
    (r"landscape/.+/skill_vs_agent", "NLL of a density at the agent's position minus NLL, nats."),
    (
        r"landscape/.+/energy",
        "Energy score, in the unit of the actions: strictly proper, no bandwidth; lower is better.",
    ),
    (r"landscape/.+/c(50|80|95)", "Share of demonstrations inside the region of that mass."),
    (r"landscape/.+/ks", "Distance of the HPD levels from uniform; 0 is calibrated."),
    (r"landscape/.+/area_rank_med", "Share of the board scoring at least as high; median."),
    (r"landscape/.+/excess_entropy", "Entropy beyond a single kernel's, nats; 0 is one blob."),
    (r"landscape/.+/hdr80_px2", "Area of the 80 % region, px^2: sharpness."),
    (r"landscape/.+/modes_mean", "Separate pieces of the 80 % region, mean over frames."),
    (r"landscape/.+/multimodal_frac", "Share of frames with more than one piece."),
    (r"landscape/.+/regret_med", "Log density of the best action over the executed one; median."),
    (r"landscape/.+/out_of_board", "Mass beyond the border."),
    (r"landscape/.+/sample_gap", "NLL gained by twice the samples; above 0.05, draw more."),
    (r"calib/.+", "Fitted scale of the Laplace noise, in the unit of the axis."),
    (r"latent/active_units", "Dimensions of the latent that carry information."),
    (r"latent/.+/sigma_z_px", "Spread of the prediction over z, px."),
    (r"latent/.+/R_z", "Spread of the prediction over z, relative to the noise scale b."),
    (r"latent/(elbo|iwae|iwae_gap)_nats", "Evidence of whole demonstrated chunks, nats."),
    (r"latent/.+/prior_gap_nats", "Clearly above 0, samples of the prior miss modes."),
    (r"attention/.+/share_.+", "Mass of the map on this input; the shares add up to 1."),
    (r"attention/.+/entropy_nats", "Entropy of the map over cells, nats."),
    (r"attention/.+/concentration", "0 prefers no cell, 1 is a single cell."),
    (r"attention/.+/deletion_ratio", "Change when the map's top patches go, over random order."),
    (r"attention/.+/insertion_ratio", "Random order over the map's, patches coming in."),
    (
        r"attention/.+/(deletion|insertion|random)_auc_[a-z]+",
        "Area under the change of action, in the unit of the actions.",
    ),
    (r"attention/.+/spearman_occlusion", "Rank correlation with occlusion, mean over frames."),
    (r"attention/.+/spearman_occlusion_frames", "Frames behind that correlation."),
    (r"attention/.+/lift_\w+_ceiling", "Largest lift that any map on these cells can have."),
    (r"attention/.+/lift_.+", "Mass on the object over its share of the area."),
    (r"attention/.+/mass_.+", "Mass of the map on the object."),
    (r"attention/.+/area_.+", "Share of the picture that the object covers."),
    (r"attention/.+/pointing_.+", "Share of frames whose top cell is on the object."),
    (r"attention/.+/spearman_counterfactual", "Rank correlation with taking objects away."),
    (r"attention/.+/tv_counterfactual", "Total variation distance from taking objects away."),
    (r"attention/.+/ssim_randomised", "Similarity with maps of shuffled weights; near 1 is bad."),
    (r"attention/.+/completeness_error", "What integrated gradients leave unexplained."),
    (r"counterfactual/effect_\w+_[a-z]+", "Change of the action without the object, in its unit."),
    (r"counterfactual/share_.+", "The object's share of all effects."),
    (r"counterfactual/sensitivity_.+", "Change of the action per px or degree of the pose."),
    (
        r"counterfactual/rerender_[a-z]+",
        "Change of the action between recorded and redrawn, in its unit.",
    ),
    (r"(.+/)?fvu", "Squared errors over those around the mean; 0 is perfect."),
    (r"(.+/)?explained_variance", "1 minus FVU."),
    (r"(.+/)?l0", "Active latents of a vector."),
    (r"train/auxiliary", "Loss that brings dead latents back."),
    (r"train/sparsity", "Penalty on active codes."),
    (r"train/dead_fraction", "Share of latents silent for a fifth of an epoch."),
    (r"(.+/)?dead_fraction", "Share of latents that never fire."),
    (r"(.+/)?dense_fraction_01", "Share of latents that fire on more than 1 % of the vectors."),
    (r"(.+/)?dense_fraction_10", "Share of latents that fire on more than 10 % of the vectors."),
    (r"(.+/)?relative_bias", "Below 1 where codes shrink."),
    (r"features/action_score", "1 where actions stay the same on reconstructions."),
    (r"features/sae_(?!l1)[a-z]+", "How far actions move on reconstructions, in their unit."),
    (
        r"features/mean_(?!l1|cosine)[a-z]+",
        "How far actions move on the mean activation, in their unit.",
    ),
    (r"features/(clean|sae|mean)_l1", "Error against demonstrated actions."),
    (r"features/(relative_)?dl1", "Error that reconstructions add."),
    (r"features/l1_recovered", "Share of the gap to mean-ablation that is recovered."),
    (r"features/r_.+", "Best single feature's correlation with the quantity, other episodes."),
    (r"features/auroc_.+", "Best single feature's AUROC for the concept, other episodes."),
    (r"features/(persisting|born|died)", "Features that stayed, came, or went."),
    (r"features/mean_cosine", "How far directions turned since the checkpoint before."),
    (r"diagnostics/share", "Share of the time spent on diagnostics."),
    (r"diagnostics/errors", "Diagnostics that failed so far."),
    (r"diagnostics/.+_s", "Time of one diagnostic, s."),
    (r"diagnostics/.+_share", "Its share of the wall time."),
    (r"diagnostics/.+_skipped", "1 where it sat this checkpoint out."),
    (r"resources/memory_mib", "Memory of all processes of the run; shared pages count once."),
    (r"resources/memory_training_mib", "Of it, the process that trains."),
    (r"resources/memory_children_mib", "Of it, what that process started: W&B, workers."),
    (r"resources/(open_files|threads|processes)", "Of all processes of the run."),
    (r"resources/disk_free_gib", "Room left on the disk of the run folder."),
)
"""Whole name of a number, and what it means; the first that fits counts."""


@cache
def meaning(metric: str) -> str:
    """Return what a number means, or nothing when nobody has said."""
    return next((text for pattern, text in MEANINGS if re.fullmatch(pattern, metric)), "")


def picture(key: str) -> Picture:
    """Return how to read a picture; one that nobody has explained goes by its key."""
    return next(
        (entry for entry in PICTURES if re.fullmatch(entry.pattern, key)),
        Picture(re.escape(key), key, ""),
    )


def order(key: str) -> int:
    """Return the place of a picture among its like: as in ``PICTURES``, unknown ones last."""
    places = (n for n, entry in enumerate(PICTURES) if re.fullmatch(entry.pattern, key))
    return next(places, len(PICTURES))


def reference(metric: str, logged: Iterable[str]) -> tuple[str, str | float] | None:
    """Return what a number is compared with: its label, and a logged name or a constant."""
    for entry in REFERENCES:
        match = re.fullmatch(entry.pattern, metric)
        if match is None:
            continue
        if entry.value is not None:
            return entry.label, entry.value
        if entry.metric is not None and (other := match.expand(entry.metric)) in logged:
            return entry.label, other
    return None


def is_curve(metric: str) -> bool:
    """Tell whether a number is worth a chart."""
    return not any(re.fullmatch(pattern, metric) for pattern in NO_CURVES)


def section(metric: str) -> str:
    """Return the key of the section that a name belongs to."""
    prefix = metric.partition("/")[0]
    # rollout_ensembled is rollouts, too.
    return SECTION_OF_PREFIX.get(prefix) or SECTION_OF_PREFIX.get(prefix.split("_")[0], "other")


def family(metric: str) -> tuple[str, str]:
    """Return the name of the chart that a number shares with its like, and its own in there."""
    for pattern in FAMILIES:
        match = re.fullmatch(pattern, metric)
        if match is not None:
            start, end = match.span("of")
            return f"{metric[:start]}*{metric[end:]}", match["of"]
    return metric, metric
