"""Where tools work: this machine or a sandbox, with checkpoints of their files."""
