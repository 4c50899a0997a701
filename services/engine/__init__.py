"""The engine: the embedded serving backend as a process of its own, in vLLM's dialect of the OpenAI API."""

import trainer as trainer  # sets how OpenMP's threads wait, before torch is imported
