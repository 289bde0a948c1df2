"""Tell what a compiled step costs: memory, operations, collectives and the time that they bound."""
