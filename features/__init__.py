"""Features of a policy: found on activations, described, and turned in the policy itself."""
