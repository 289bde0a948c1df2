"""Rollouts: which episodes are played when, and what a training step takes of them.

scheduler        starts groups of episodes under the bound on staleness; hands over complete ones
player           plays an episode until its trajectory is trainable
group, episode   what is scheduled and played; pending, journal, accounting: the scheduler's books
curriculum       which families of tasks are played
anchors, forks   hard tasks start inside a trajectory that solved them
demonstrations   scripted players show how a task is solved
outcomes         metrics of a step's episodes, and groups that can teach
simulator        the scheduler on a virtual clock, with a model of a pod around it
"""
