"""The protocol between the SDK and a ROCK service: operations, errors, connections, archives."""
