"""Fast forms of the model's operations, each beside a plain reference, and the choice of forms."""
