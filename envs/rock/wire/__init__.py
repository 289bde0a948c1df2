"""What travels between the SDK and a ROCK service: operations, connections, archives of files."""
