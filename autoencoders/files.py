"""Autoencoders as folders that load alone, here and in SAELens.

``sae_weights.safetensors`` and ``cfg.json`` are what SAELens 6 writes itself, input scale folded
in: ``sae_lens.SAE.load_from_disk(folder)`` reads them, and so do SAEBench and SAEDashboard. A
trained BatchTopK (Matryoshka too) is a JumpReLU there, with its threshold repeated for each latent.
``metadata.policyscope`` of ``cfg.json`` adds what it takes to be ours again, and where the
activations came from.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from autoencoders.sae import SparseAutoencoder, build_autoencoder
from policies.atomic_files import write_atomically
from policies.json_files import read_json
from policies.tensor_files import load_tensors, save_tensors

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"
SPARSITY_FILE = "sparsity.safetensors"
FORMAT_VERSION = 1
OURS = "policyscope"
AUTOENCODER_FOLDER = "autoencoder"
"""Name of the folder within a run."""

PEER_ARCHITECTURE = {
    "batch_topk": "jumprelu",
    "matryoshka_batch_topk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "topk": "topk",
    "vanilla": "standard",
}
"""What SAELens calls an architecture at inference."""
OUR_ARCHITECTURE = {"jumprelu": "jumprelu", "topk": "topk", "standard": "vanilla"}


class AutoencoderError(ValueError):
    """A folder that holds no usable autoencoder; the message names file, key and mend."""


@dataclass(frozen=True)
class LoadedAutoencoder:
    """An autoencoder in eval mode, and where its activations came from."""

    sae: SparseAutoencoder
    metadata: Mapping[str, Any]
    """``layer``, ``positions``, ``policy_hash``, ``split``, ...; empty for a foreign one."""
    density: Float[Tensor, " latent"] | None
    """Share of held-out vectors on which each latent is active, where it was saved."""
    source: Path


def save_autoencoder(
    sae: SparseAutoencoder,
    folder: Path,
    metadata: Mapping[str, Any],
    density: Float[Tensor, " latent"] | None = None,
) -> Path:
    """Write an autoencoder; each file appears complete or not at all.

    The input scale is folded into biases and threshold: with unit decoder rows, z = W (s x - b) + c
    and x^ = (W_d z + b) / s are the same map as z' = z / s with biases b / s, c / s and threshold
    theta / s.

    Args:
        sae: What to write.
        folder: Made when missing; files in it are replaced.
        metadata: Plain values that say where its activations came from; ``layer`` becomes
            SAELens's ``hook_name``.
        density: Share of vectors on which each latent is active.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scale = float(sae.scale)
    weights = {
        "W_enc": sae.W_enc.detach().T.contiguous(),
        "b_enc": sae.b_enc.detach() / scale,
        "W_dec": sae.W_dec.detach().contiguous(),
        "b_dec": sae.b_dec.detach() / scale,
    }
    architecture = PEER_ARCHITECTURE[sae.architecture]
    if architecture == "jumprelu":
        weights["threshold"] = (sae.threshold.detach() / scale).expand(sae.n_latents).contiguous()
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "hook_name": metadata.get("layer"),
            "model_name": metadata.get("policy"),
            OURS: {
                "format_version": FORMAT_VERSION,
                "architecture": sae.architecture,
                "hyper_parameters": dict(sae.hyper_parameters),
                "scale": scale,
                "variance": float(sae.variance) / scale**2,
                **metadata,
            },
        },
    }
    if architecture == "topk":
        config |= {"k": sae.hyper_parameters["k"], "rescale_acts_by_decoder_norm": False}
    if density is not None:
        log_density = (density.double() + 1e-10).log10().float()
        save_tensors(folder / SPARSITY_FILE, {"sparsity": log_density})
    save_tensors(folder / WEIGHTS_FILE, {name: value.float() for name, value in weights.items()})
    # Last: a folder without it is none yet.
    text = json.dumps(config, indent=1) + "\n"
    write_atomically(folder / CONFIG_FILE, text)
    return folder


def find_autoencoder(path: str | os.PathLike[str]) -> Path:
    """Resolve a path to a folder with an autoencoder: itself, or the one of a run.

    Raises:
        AutoencoderError: If there is none, naming what was looked for.
    """
    given = Path(path).expanduser()
    for folder in (given, given / AUTOENCODER_FOLDER):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise AutoencoderError(
        f"{given}: holds neither {CONFIG_FILE} nor {AUTOENCODER_FOLDER}/{CONFIG_FILE}; give the "
        "folder of an autoencoder, or of a run that trained one"
    )


def load_autoencoder(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> LoadedAutoencoder:
    """Load an autoencoder that we or SAELens wrote.

    Args:
        path: Its folder, or the folder of a run that trained one.
        device: Where it goes.

    Raises:
        AutoencoderError: If files are missing or damaged, shapes do not fit, or the architecture or
            a setting is one that is not implemented here.
    """
    folder = find_autoencoder(path)
    config = _read_config(folder / CONFIG_FILE)
    ours = (config.get("metadata") or {}).get(OURS) or {}
    sae = _build(config, ours, _read_tensors(folder / WEIGHTS_FILE), folder)
    sae.eval().requires_grad_(False).to(device)
    density = None
    if (folder / SPARSITY_FILE).is_file():
        sparsity = _read_tensors(folder / SPARSITY_FILE).get("sparsity")
        if sparsity is None or sparsity.shape != (sae.n_latents,) or bool(sparsity.isnan().any()):
            raise AutoencoderError(
                f"{folder / SPARSITY_FILE}: holds no sparsity of {sae.n_latents} latents; {_AGAIN}"
            )
        density = (10.0 ** sparsity.double()).float()
    known = {"format_version", "architecture", "hyper_parameters", "scale", "variance"}
    metadata = {key: value for key, value in ours.items() if key not in known}
    return LoadedAutoencoder(sae, metadata, density, folder)


_AGAIN = "save the autoencoder again"


def _read_tensors(file: Path) -> dict[str, Tensor]:
    return load_tensors(
        file, lambda problem: AutoencoderError(f"{file}: {problem}; copy it again, or {_AGAIN}")
    )


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(
        file, lambda problem: AutoencoderError(f"{file}: {problem}; copy it again, or {_AGAIN}")
    )
    for key in ("architecture", "d_in", "d_sae"):
        if key not in config:
            raise AutoencoderError(f"{file}: {key} is missing; {_AGAIN}")
    for key in ("d_in", "d_sae"):
        if type(config[key]) is not int or config[key] < 1:
            raise AutoencoderError(f"{file}: {key} is {_short(config[key])}; {_AGAIN}")
    metadata = config.get("metadata") or {}
    ours = metadata.get(OURS) or {} if isinstance(metadata, dict) else None
    if not isinstance(ours, dict):
        raise AutoencoderError(f"{file}: metadata is no object of objects; {_AGAIN}")
    unsupported = {
        "normalize_activations": ("none",),
        "reshape_activations": ("none",),
        "rescale_acts_by_decoder_norm": (False,),
    }
    for key, allowed in unsupported.items():
        if config.get(key, allowed[0]) not in allowed:
            raise AutoencoderError(
                f"{file}: {key} is {_short(config[key])}, which is not supported; fold it into the "
                f"weights and set {key} to {allowed[0]!r}"
            )
    version = ours.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise AutoencoderError(
            f"{file}: format_version {_short(version)}, this version reads {FORMAT_VERSION}; "
            f"{_AGAIN} with this version"
        )
    return config


def _build(
    config: Mapping[str, Any],
    ours: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    folder: Path,
) -> SparseAutoencoder:
    d_in, n_latents = config["d_in"], config["d_sae"]
    shapes = {
        "W_enc": (d_in, n_latents),
        "b_enc": (n_latents,),
        "W_dec": (n_latents, d_in),
        "b_dec": (d_in,),
    }
    if config["architecture"] == "jumprelu":
        shapes["threshold"] = (n_latents,)
    # Before anything of these sizes is made.
    for name, shape in shapes.items():
        if name not in weights:
            raise AutoencoderError(f"{folder / WEIGHTS_FILE}: {name} is missing")
        if tuple(weights[name].shape) != shape:
            raise AutoencoderError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {tuple(weights[name].shape)}, "
                f"{CONFIG_FILE} says {shape}"
            )
        if not torch.isfinite(weights[name]).all():
            raise AutoencoderError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity")
    try:
        if ours:
            architecture, arguments = ours["architecture"], dict(ours["hyper_parameters"])
            if (arguments.get("d_in"), arguments.get("n_latents")) != (d_in, n_latents):
                raise ValueError("hyper_parameters are of an autoencoder of another size")
        else:
            architecture = OUR_ARCHITECTURE.get(config["architecture"])
            arguments = {"d_in": d_in, "n_latents": n_latents}
            if architecture == "topk":
                arguments["k"] = config["k"]
        sae = build_autoencoder(str(architecture), **arguments)
        variance = float(ours["variance"]) if "variance" in ours else None
        if variance is not None and not 0 <= variance < math.inf:
            raise ValueError(f"variance is {variance}")
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise AutoencoderError(
            f"{folder / CONFIG_FILE}: architecture {_short(config['architecture'])} cannot be "
            f"built ({type(error).__name__}: {shorten(str(error), 200)})"
        ) from error
    values = {name: value.float() for name, value in weights.items()}
    b_enc, W_enc = values["b_enc"], values["W_enc"]
    if not config.get("apply_b_dec_to_input", True):
        b_enc = b_enc + values["b_dec"] @ W_enc
    with torch.no_grad():
        sae.W_enc.copy_(W_enc.T)
        sae.b_enc.copy_(b_enc)
        sae.W_dec.copy_(values["W_dec"])
        sae.b_dec.copy_(values["b_dec"])
        sae.scale.fill_(1.0)
        if variance is not None:
            # Trained on goes what was saved, in units where the scale is 1.
            sae.variance.fill_(variance)
            sae.is_initialised.fill_(True)
        if "threshold" in shapes:
            sae.threshold.copy_(values["threshold"])
    return sae


def _short(value: Any) -> str:
    return shorten(ascii(value), 80)
