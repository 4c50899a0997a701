"""The engine: the embedded serving backend as a process of its own, in vLLM's dialect of the OpenAI API."""

import os

# Several processes share few cores here. Threads of OpenMP that spin while they wait cost the others, and this
# process itself, up to ten times what the work does. Read by the runtime when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
