"""Benchmarks that can be trusted: a dataset, an agent, k attempts at each task, and figures with
intervals.

    tasks.py          what is played: Harbor and Terminal-Bench folders, generated terminal families
    agents.py         who plays: the reference solution, nobody, a cheat, a policy; endpoint.py: a model behind a chat-completions URL
    runner.py         attempts side by side, each kept as it ends; a killed run is taken up again
    statistics.py     pass@k, means and their intervals; report.py: results.json, report.md and report.html
    validate.py       proves a dataset; contamination.py looks for its tasks in a text corpus

The entry point is launch/eval.py.
"""
