"""The code of the sandbox host processes: standard library and relative imports only.

The manager (a JAX process that may hold gigabytes) must never fork. It starts one small process,
the zygote, which forks one holder for each sandbox; a holder starts that sandbox's commands. See
zygote.py for the whole chain.
"""
