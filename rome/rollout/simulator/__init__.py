"""Prediction of the throughput and staleness of rollouts, before a pod is rented."""
