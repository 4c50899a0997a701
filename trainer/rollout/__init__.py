"""Rollouts: sampling from a policy, for training in bulk and for requests as they come."""
