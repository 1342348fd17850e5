"""Settings of every test: no hub, no spinning threads, shapes checked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import torch
from jaxtyping import install_import_hook

# Two threads on two shared cores wait for each other longer than one works alone.
torch.set_num_threads(1)

# In tests every signature's shapes are checked at every call; at run time they cost nothing.
# Not in policies.interface, whose observations tests also build wrongly, on purpose.
_CHECKED = (
    "policies.act",
    "policies.backbones",
    "policies.ensembling",
    "landscapes",
    "attention",
    "autoencoders",
    "features",
    "policies.tokens",
    "datamodules",
    "envs",
    "rendering",
    "lightning_modules",
)
# An int is a float, as everywhere in Python (PEP 484).
_CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
install_import_hook(_CHECKED, _CHECKER).__enter__()
