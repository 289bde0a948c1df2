"""The embedded backend: sandboxes made by the kernel of this machine, without a daemon."""
