"""What happens around training: logging, saving, resuming, diagnosing. Thin by intent."""
