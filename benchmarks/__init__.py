"""Side-by-side measurements.

Each prints what it found and, with --json FILE, leaves it where a program can read it.
"""
