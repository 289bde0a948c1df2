"""What users write for the agent: settings, instructions, skills, agents, commands, hooks."""
