"""The remote backend: sandboxes of a ROCK service, over HTTP."""
