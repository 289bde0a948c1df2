"""Documents for continual pre-training, made from git repositories with history.

`corpus.build_corpus` makes and refines a set; its docstring says what lies where.
"""
