"""Scripts that draw the pictures of the documentation and generate its tables.

Each module is a command, `python -m docs.figures.NAME`, and writes into docs/images or docs/.
"""
