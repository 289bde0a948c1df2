"""Synthesis of verified tasks, and the four-stage filter of trajectories.

`pipeline.synthesise` runs four agents one after the other: Explore finds seeds, Instance Builder
makes drafts of tasks, Review proves them, Trajectory plays them. `filter.run_filter` judges
trajectories.
"""
