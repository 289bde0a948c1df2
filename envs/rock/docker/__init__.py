"""The Docker backend: a sandbox is a container of this machine's engine."""
