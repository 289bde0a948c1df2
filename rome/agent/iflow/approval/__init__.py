"""Which calls may run: modes, rules, the syntax of commands, and the supervisor."""
