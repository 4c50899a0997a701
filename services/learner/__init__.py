"""The learner service: when a policy is trained, on what, and what is announced of it."""
