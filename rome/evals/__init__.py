"""Evaluation: a dataset, an agent, k attempts at each task, and metrics with intervals.

    run.py            evaluate, validate and decontaminate: the three jobs, callable from Python
    tasks.py          datasets: Harbor and Terminal-Bench folders, generated terminal families
    worlds.py         datasets of tool-use worlds, problems and games
    agents.py         agents that need no model: the reference solution, doing nothing, cheats
    policy.py         a model behind SGLang's protocol, played by the agent loop
    endpoint.py       a model behind a chat-completions URL
    runner.py         plays attempts concurrently and keeps each one; resumes a killed evaluation
    statistics.py     pass@k, means and their intervals
    report.py         results.json, report.md and report.html
    validate.py       proves that a dataset's tasks are solvable and cannot be cheated
    contamination.py  searches a text corpus for a dataset's tasks

The command is launch/eval.py.
"""
