"""Red team: searches for injections that succeed against a given agent (`launch.redteam`).

words     what an attacker says: openings, mutations, likeness, minimising
writer    an attacker's model that rewrites words
search    proposes, plays, confirms and keeps
report    what was found, for people and programs
"""
