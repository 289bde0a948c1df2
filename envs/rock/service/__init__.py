"""ROCK as services: an admin that gives sandboxes out, workers that run them, and the JSON protocol
between them and the SDK's remote backend.
"""
