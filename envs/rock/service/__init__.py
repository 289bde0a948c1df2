"""ROCK's services: an admin that gives out sandboxes, and the workers that run them."""
