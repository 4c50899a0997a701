"""The gateway: answers agents in OpenAI's form, and leaves what happened in the log before the answer ends.

One request, top to bottom: ``app`` (who asks, how much) → ``ask`` (is it sound, what will the engine be asked) →
``conversations`` and ``routes`` (which episode, which policy version) → ``calls`` (ask the engine, answer) →
``capture`` (events into the log). Beside it: ``feedback``, ``events`` and ``traces`` take what people, SDKs and
instrumentations say; ``tracing`` makes spans of the gateway's own.
"""
