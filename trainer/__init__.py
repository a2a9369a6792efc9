"""Trainer: takes batches of refinements, updates the policy with DeepSpeed, publishes every version of it."""
