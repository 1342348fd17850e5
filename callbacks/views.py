"""The policy that a Lightning module trains, as diagnostics see it."""

from lightning.pytorch import LightningModule

from policies.interface import PolicyView


def policy_view(module: LightningModule) -> PolicyView:
    """Return the module's policy.

    Raises:
        TypeError: If the module has no ``view``, or it is no policy.
    """
    view = getattr(module, "view", None)
    if not isinstance(view, PolicyView):
        raise TypeError(f"{type(module).__name__} has no policy view: this callback needs a policy")
    return view
