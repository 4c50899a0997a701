"""The learner: when to train, one run at a time for each policy, and what became of it."""
