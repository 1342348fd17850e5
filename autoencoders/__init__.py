"""Sparse autoencoders: what explains activations. Pure torch."""
