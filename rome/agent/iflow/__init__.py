"""iFlow: the agent of this project, in production and in training.

One typed stream of events (`events`) is the session file, the output of the headless mode, what a
session is resumed from, and the input of every interface. The loop (`loop`) knows models
(`model`), tools (`tools`) and the places where they work (`workspace`), and no interface.
"""
