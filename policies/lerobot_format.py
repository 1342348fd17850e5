"""LeRobot's formats: parameter names of its ACT, one to one with ours."""

import re
from collections.abc import Mapping

from torch import Tensor

from policies.act import ACT

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"network\.backbone\.(?P<rest>.+)", r"model.backbone.\g<rest>"),
    (r"network\.image_projection\.(?P<rest>.+)", r"model.encoder_img_feat_input_proj.\g<rest>"),
    (r"network\.latent_projection\.(?P<rest>.+)", r"model.encoder_latent_input_proj.\g<rest>"),
    (r"network\.state_projection\.(?P<rest>.+)", r"model.encoder_robot_state_input_proj.\g<rest>"),
    (
        r"network\.environment_state_projection\.(?P<rest>.+)",
        r"model.encoder_env_state_input_proj.\g<rest>",
    ),
    (r"network\.vector_positions", r"model.encoder_1d_feature_pos_embed.weight"),
    (r"network\.query_positions", r"model.decoder_pos_embed.weight"),
    (r"network\.action_head\.(?P<rest>.+)", r"model.action_head.\g<rest>"),
    (r"network\.posterior\.class_token", r"model.vae_encoder_cls_embed.weight"),
    (
        r"network\.posterior\.state_projection\.(?P<rest>.+)",
        r"model.vae_encoder_robot_state_input_proj.\g<rest>",
    ),
    (
        r"network\.posterior\.action_projection\.(?P<rest>.+)",
        r"model.vae_encoder_action_input_proj.\g<rest>",
    ),
    (
        r"network\.posterior\.latent_head\.(?P<rest>.+)",
        r"model.vae_encoder_latent_output_proj.\g<rest>",
    ),
    (r"network\.posterior\.encoder\.(?P<rest>.+)", r"model.vae_encoder.\g<rest>"),
    (r"network\.(?P<stack>encoder|decoder)\.(?P<rest>.+)", r"model.\g<stack>.\g<rest>"),
)
_LAYER_RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.self_attention\.", ".self_attn."),
    (r"\.cross_attention\.", ".multihead_attn."),
    (r"\.feed_forward\.", "."),
)


def lerobot_name(name: str) -> str:
    """Translate one of our parameter names (of ``ACTPolicy``) into LeRobot's.

    Raises:
        ValueError: If the name has no counterpart.
    """
    for pattern, replacement in _RENAMES:
        match = re.fullmatch(pattern, name)
        if match:
            renamed = match.expand(replacement)
            for layer_pattern, layer_replacement in _LAYER_RENAMES:
                renamed = re.sub(layer_pattern, layer_replacement, renamed)
            return renamed
    raise ValueError(f"parameter {name!r} has no counterpart in LeRobot's ACT")


def network_to_lerobot(network: ACT) -> dict[str, Tensor]:
    """Return the network's weights under LeRobot's names (prefix ``model.``)."""
    weights = {
        lerobot_name(f"network.{name}"): value for name, value in network.state_dict().items()
    }
    if network.posterior is not None:
        weights["model.vae_encoder_pos_enc"] = network.posterior.positions[None]
    return weights


def load_lerobot_weights(network: ACT, weights: Mapping[str, Tensor]) -> None:
    """Load LeRobot's ACT weights into our network, strictly.

    LeRobot's own loader is lenient, so that a misnamed tensor stays random there; this one is not.
    Weights of the posterior may be absent as a whole: they play no part in execution.

    Raises:
        ValueError: If a tensor is missing, superfluous, or of another shape; all are named.
    """
    own = network.state_dict()
    expected = {lerobot_name(f"network.{name}"): name for name in own}
    given = {name: value for name, value in weights.items() if name != "model.vae_encoder_pos_enc"}
    posterior_given = any(name.startswith("model.vae_encoder") for name in given)
    problems = [f"unknown tensor {name}" for name in given if name not in expected]
    for theirs, ours in expected.items():
        if theirs not in given:
            if posterior_given or not theirs.startswith("model.vae_encoder"):
                problems.append(f"missing tensor {theirs}")
        elif given[theirs].shape != own[ours].shape:
            shape, expected_shape = tuple(given[theirs].shape), tuple(own[ours].shape)
            problems.append(f"{theirs} has shape {shape}, expected {expected_shape}")
    if problems:
        raise ValueError("the weights do not fit this ACT: " + "; ".join(problems))
    loaded = {expected[name]: value for name, value in given.items()}
    network.load_state_dict(loaded, strict=posterior_given or network.posterior is None)
