"""The reward model: encoder, heads that learn online, calibration, and the handler that runs it."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait cost everyone else
