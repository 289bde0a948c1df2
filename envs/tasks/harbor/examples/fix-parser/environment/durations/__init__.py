from durations.parse import seconds

__all__ = ["seconds"]
