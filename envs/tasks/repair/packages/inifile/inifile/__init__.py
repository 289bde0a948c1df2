"""INI files: sections of names and values, with continued lines, references and comments."""

from .document import Document, IniError

__all__ = ["Document", "IniError"]
