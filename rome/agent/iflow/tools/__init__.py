"""The agent's tools; one file a kind."""
