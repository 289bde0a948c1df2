"""Text to tokens: (kind, value, place)."""

SYMBOLS = ("**", "<=", ">=", "==", "!=", "+", "-", "*", "/", "%", "(", ")", ",", "<", ">", "=", "?", ":")


class SyntaxFault(ValueError):
    def __init__(self, place, message):
        super().__init__("at %d: %s" % (place, message))
        self.place = place


def tokenize(text):
    """Kinds are number, name, symbol and, last, end. Comments begin with # and end with their line."""
    found, place = [], 0
    while place < len(text):
        letter = text[place]
        if letter.isspace():
            place += 1
        elif letter == "#":
            while place < len(text) and text[place] != "\n":
                place += 1
        elif letter.isdigit() or (letter == "." and text[place + 1:place + 2].isdigit()):
            end = _number_end(text, place)
            digits = text[place:end].replace("_", "")
            found.append(("number", float(digits) if "." in digits or "e" in digits else int(digits), place))
            place = end
        elif letter.isalpha() or letter == "_":
            end = place
            while end < len(text) and (text[end].isalnum() or text[end] == "_"):
                end += 1
            found.append(("name", text[place:end], place))
            place = end
        else:
            for symbol in SYMBOLS:
                if text.startswith(symbol, place):
                    found.append(("symbol", symbol, place))
                    place += len(symbol)
                    break
            else:
                raise SyntaxFault(place, "unexpected %r" % letter)
    found.append(("end", None, len(text)))
    return found


def _number_end(text, place):
    """Where a number ends: digits with _ between them, one point, an exponent."""
    end, point = place, False
    while end < len(text):
        letter = text[end]
        if letter == "." and not point:
            point = True
        elif letter == "e" and text[end + 1:end + 2].lstrip("-").isdigit():
            end += 1
            while end < len(text) and text[end].isdigit():
                end += 1
            break
        elif letter == "e" and text[end + 1:end + 2] == "-" and text[end + 2:end + 3].isdigit():
            end += 2
            while end < len(text) and text[end].isdigit():
                end += 1
            break
        elif not letter.isdigit() and not (letter == "_" and text[end + 1:end + 2].isdigit()):
            break
        end += 1
    return end
