"""The SDK's capture part: episodes and feedback on their way from an agent to the gateway.

Nothing in here may slow, block or break the agent: calls append to a bounded queue, a background thread sends,
what cannot be sent is counted, and no exception reaches the agent (unless ``strict`` asks for it).
"""
