"""Policies, rollouts and training: everything that runs on torch."""

import os

# Several processes share few cores. Threads of OpenMP that spin while they wait cost the others, and this process
# itself, up to ten times what the work does. Read by the runtime when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
