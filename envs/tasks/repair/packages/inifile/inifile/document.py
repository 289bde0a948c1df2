"""A document is read, changed and written."""

import re

YES, NO = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
_REFERENCE = re.compile(r"\$\{(?:([^${}:]+):)?([^${}:]+)\}")
MAX_DEPTH = 10


class IniError(ValueError):
    def __init__(self, line, message):
        super().__init__("line %d: %s" % (line, message) if line else message)
        self.line = line


class Document:
    """Names keep their order and do not care for case; a name before the first section is in the section ""."""

    def __init__(self):
        self._sections = {"": {}}

    @classmethod
    def parse(cls, text):
        document, section, name = cls(), "", None
        for number, raw in enumerate(text.splitlines(), 1):
            line = raw.strip()
            if not line:
                name = None
                continue
            if line[0] in "#;":
                continue
            if raw[0].isspace() and name is not None:
                document._sections[section][name] += "\n" + line
                continue
            if line.startswith("["):
                if not line.endswith("]") or len(line) < 3:
                    raise IniError(number, "a section is [name]")
                section, name = line[1:-1].strip(), None
                if section in document._sections:
                    raise IniError(number, "section %r is there twice" % section)
                document._sections[section] = {}
                continue
            key, separator, value = line.partition("=")
            if not separator or not key.strip():
                raise IniError(number, "neither a section nor name = value")
            name = key.strip().lower()
            if name in document._sections[section]:
                raise IniError(number, "%r is there twice in section %r" % (name, section))
            document._sections[section][name] = _unquote(_uncomment(value).strip())
        return document

    def sections(self):
        return [section for section in self._sections if section]

    def names(self, section=""):
        return list(self._section(section))

    def raw(self, name, section=""):
        """A value as it is written."""
        values = self._section(section)
        if name.lower() not in values:
            raise KeyError("%s.%s" % (section, name) if section else name)
        return values[name.lower()]

    def get(self, name, section="", default=None):
        """A value, with ${name} and ${section:name} filled in."""
        try:
            return self._filled(self.raw(name, section), section, 0)
        except KeyError:
            if default is None:
                raise
            return default

    def number(self, name, section="", default=None):
        text = self.get(name, section, None if default is None else str(default)).replace("_", "")
        return float(text) if "." in text else int(text)

    def flag(self, name, section="", default=None):
        text = self.get(name, section, default).lower()
        if text in YES:
            return True
        if text in NO:
            return False
        raise IniError(0, "%s is neither yes nor no: %r" % (name, text))

    def items(self, name, section=""):
        """A value of several lines or with commas, as a list without empty entries."""
        return [item.strip() for line in self.get(name, section).split("\n") for item in line.split(",") if item.strip()]

    def set(self, name, value, section=""):
        self._sections.setdefault(section, {})[name.lower()] = str(value)

    def remove(self, name, section=""):
        """Takes a name out; a section without names goes too."""
        del self._section(section)[name.lower()]
        if section and not self._sections[section]:
            del self._sections[section]

    def merge(self, other):
        """The other's values over these."""
        for section, values in other._sections.items():
            self._sections.setdefault(section, {}).update(values)
        return self

    def render(self):
        blocks = []
        for section, values in self._sections.items():
            lines = ["[%s]" % section] if section else []
            for name, value in values.items():
                quoted = '"%s"' % value if value != value.strip() or "#" in value or value.startswith('"') else value
                lines.append("%s = %s" % (name, quoted.replace("\n", "\n    ")))
            if lines:
                blocks.append("\n".join(lines) + "\n")
        return "\n".join(blocks)

    def _section(self, section):
        if section not in self._sections:
            raise KeyError("section %s" % section)
        return self._sections[section]

    def _filled(self, value, section, depth):
        if depth > MAX_DEPTH:
            raise IniError(0, "references go round in a circle: %r" % value)
        return _REFERENCE.sub(lambda match: self._filled(self.raw(match[2], match[1] or section), match[1] or section, depth + 1), value)


def _uncomment(value):
    """Without a comment, which begins with # after a space, outside quotes."""
    quoted = False
    for place, letter in enumerate(value):
        if letter == '"':
            quoted = not quoted
        elif letter == "#" and not quoted and value[place - 1].isspace():
            return value[:place]
    return value


def _unquote(value):
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1]
    return value
