def apply_flags(): pass
