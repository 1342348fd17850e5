"""Simulated tasks: the environments, who solves them by hand-written rules, and rollouts."""
