"""What a policy would do everywhere in action space: densities, methods and their metrics."""
