"""Decides what is live: examines candidates, runs canaries, promotes, rolls back, and says so in the log."""
