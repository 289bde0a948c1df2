"""Trajectories of other programs: files, their formats, and how they become token ids.

files.py finds the records of a file; the readers (messages, sharegpt, atif, nemo_gym) know a format
each; render.py turns a conversation into ids; records.py is what training reads.
"""
