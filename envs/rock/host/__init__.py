"""What runs inside the small sandbox host process: standard library only, relative imports only.

The manager (a JAX process with gigabytes resident) must never fork, so it starts one small process,
the zygote, which forks one holder for each sandbox; a holder starts that sandbox's commands. See
zygote.py for the whole chain.
"""
