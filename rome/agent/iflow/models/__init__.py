"""What answers the agent: a policy on token ids, an engine, or any endpoint."""
