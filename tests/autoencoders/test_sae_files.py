"""A saved autoencoder is the same map again, here and by SAELens's own formula."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoders.files import (
    PEER_ARCHITECTURE,
    AutoencoderError,
    find_autoencoder,
    load_autoencoder,
    save_autoencoder,
)
from autoencoders.fit import fit_autoencoder
from autoencoders.sae import ARCHITECTURES, build_autoencoder

D_IN, N_LATENTS = 8, 24
METADATA = {"layer": "encoder", "policy": "act", "policy_hash": "abc", "split": {"train": [0]}}


def data(n=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 + 5 * torch.randn(n, D_IN, generator=generator)


def trained(architecture):
    torch.manual_seed(0)
    arguments = {"k": 3} if "topk" in architecture.replace("_", "") else {}
    sae = build_autoencoder(architecture, d_in=D_IN, n_latents=N_LATENTS, **arguments)
    fit_autoencoder(sae, data(), n_steps=20, batch_size=128)
    sae.calibrate([data(seed=1)])
    return sae


def saved_by_peer(folder, x):
    """SAELens 6's encode and decode, from the files alone (sae_lens/saes/*.py)."""
    config = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    assert config["normalize_activations"] == "none"
    assert weights["W_enc"].shape == (config["d_in"], config["d_sae"])
    assert weights["W_dec"].shape == (config["d_sae"], config["d_in"])
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    codes = pre.relu()
    if config["architecture"] == "jumprelu":
        codes = codes * (pre > weights["threshold"])
    if config["architecture"] == "topk":
        top = pre.topk(config["k"], dim=-1)
        codes = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    return codes, codes @ weights["W_dec"] + weights["b_dec"]


@pytest.mark.parametrize("architecture", sorted(PEER_ARCHITECTURE))
def test_saved_and_loaded_is_the_same_map(architecture, tmp_path):
    sae, x = trained(architecture), data(seed=2)
    density = torch.linspace(0, 1, N_LATENTS)
    folder = save_autoencoder(sae, tmp_path / "sae", METADATA, density)
    loaded = load_autoencoder(folder)
    codes = sae.encode(x)
    assert (codes > 0).any()
    torch.testing.assert_close(loaded.sae.encode(x), codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.sae(x), sae(x), rtol=1e-4, atol=1e-4)
    assert loaded.metadata == METADATA
    torch.testing.assert_close(loaded.density, density, rtol=1e-4, atol=1e-6)
    assert type(loaded.sae) is type(sae)
    assert loaded.sae.hyper_parameters == sae.hyper_parameters

    peer_codes, peer_reconstruction = saved_by_peer(folder, x)
    torch.testing.assert_close(peer_codes, codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(peer_reconstruction, sae(x), rtol=1e-4, atol=1e-4)


def test_a_loaded_autoencoder_is_trained_on_from_where_it_was(tmp_path):
    sae = trained("batch_topk")
    loaded = load_autoencoder(save_autoencoder(sae, tmp_path, METADATA)).sae
    loaded.requires_grad_(True)
    fit_autoencoder(loaded, data(), n_steps=1, batch_size=128)
    assert float((loaded.W_dec - sae.W_dec).abs().max()) < 0.1
    expected = sae.variance / sae.scale.square()
    assert float(loaded.variance) == pytest.approx(float(expected), rel=1e-4)


def test_every_architecture_can_be_saved():
    assert set(PEER_ARCHITECTURE) == set(ARCHITECTURES)


@pytest.mark.parametrize("applies_b_dec", [True, False])
def test_a_folder_of_the_peers_loads_too(applies_b_dec, tmp_path):
    sae, x = trained("batch_topk"), data(seed=2)
    folder = save_autoencoder(sae, tmp_path, METADATA)
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["policyscope"]
    config["apply_b_dec_to_input"] = applies_b_dec
    (folder / "cfg.json").write_text(json.dumps(config))
    if not applies_b_dec:
        weights = load_file(folder / "sae_weights.safetensors")
        weights["b_enc"] = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
        save_file(weights, folder / "sae_weights.safetensors")
    loaded = load_autoencoder(folder)
    torch.testing.assert_close(loaded.sae.encode(x), sae.encode(x), rtol=1e-3, atol=1e-3)
    assert loaded.metadata == {}


def spoil(folder, change):
    config = json.loads((folder / "cfg.json").read_text())
    change(config)
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: config.pop("d_sae"), "d_sae is missing"),
        (lambda config: config.update(d_sae=N_LATENTS + 1), "W_enc has shape"),
        (lambda config: config.update(normalize_activations="layer_norm"), "normalize_activations"),
        (
            lambda config: config["metadata"]["policyscope"].update(architecture="wavelet"),
            "wavelet",
        ),
        (lambda config: config["metadata"]["policyscope"].update(format_version=2), "version"),
    ],
)
def test_what_cannot_be_loaded_is_named(change, named, tmp_path):
    folder = save_autoencoder(trained("batch_topk"), tmp_path, METADATA)
    spoil(folder, change)
    with pytest.raises(AutoencoderError, match=named):
        load_autoencoder(folder)


def test_damaged_weights_are_named(tmp_path):
    folder = save_autoencoder(trained("topk"), tmp_path, METADATA)
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(AutoencoderError, match=r"sae_weights\.safetensors"):
        load_autoencoder(folder)


def test_a_run_leads_to_its_autoencoder_and_nothing_leads_nowhere(tmp_path):
    folder = save_autoencoder(trained("topk"), tmp_path / "run" / "autoencoder", METADATA)
    assert find_autoencoder(tmp_path / "run") == folder
    with pytest.raises(AutoencoderError, match=r"cfg\.json"):
        find_autoencoder(tmp_path)
