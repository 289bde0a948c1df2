"""The terminal interface: it listens to the events of a session and calls its agent's methods.

`terminal` holds the state and the loop, `screen` shows events, `keyboard` reads lines, and
`slash_commands` are what begins with a slash.
"""
