"""Thin Lightning modules: losses, optimisers and the names under which numbers are logged."""
