"""All methods, as ``--method`` names them."""

from attention.gradients import GradCAM, IntegratedGradients, Relevancy
from attention.maps import CrossAttention, EncoderAttention, Rollout
from attention.method import Method
from attention.occlusion import Occlusion

ATTENTION_METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (CrossAttention, EncoderAttention, Rollout, Relevancy)
}
"""Methods of ``analyze.py attention``: where information is read from."""
SALIENCY_METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (GradCAM, IntegratedGradients, Occlusion)
}
"""Methods of ``analyze.py saliency``: what the action depends on."""
METHODS = ATTENTION_METHODS | SALIENCY_METHODS
