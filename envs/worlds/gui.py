"""The system of the GUI world: an organiser with contacts, a calendar and settings, as a text DOM.

The pages are lists, forms and dialogs. A page is a list of elements with references e1, e2, ...
that hold until the next action. The screen's state is in the database's "_ui", which does not
count; a change counts once its form is saved. A dialog is modal: while it is open the page has only
its buttons.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import re
from typing import Any

from envs.gem import ToolCall
from envs.worlds.names import CITIES, clock
from envs.worlds.scenario import calling
from envs.worlds.tools import Database, Tool, ToolRefusal, text

POLICY = """\
You operate an organiser for its user, by the elements of its pages. Rules:
1. `look` shows the page. References such as e3 hold until the next action; each action shows the \
page that it leads to.
2. A form changes nothing until it is saved. Lists show five entries at a time and have a \
search box.
3. Do what the user asks for and nothing else. Ask for what you need to know, and tell the user \
what was asked."""

ROWS = 5
TIMES = tuple(clock(minutes) for minutes in range(8 * 60, 18 * 60 + 1, 30))
GROUPS = ("family", "friends", "work")
REMINDERS = ("none", "10 minutes", "1 hour", "1 day")
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "Display": {
        "Theme": ("light", "dark", "system"),
        "Font size": ("small", "medium", "large"),
        "Show week numbers": ("off", "on"),
    },
    "Sound": {
        "Ringtone": ("Aurora", "Bells", "Classic", "Drops"),
        "Volume": ("0", "25", "50", "75", "100"),
        "Vibrate": ("off", "on"),
    },
    "Privacy": {
        "Share location": ("never", "while used", "always"),
        "Lock after": ("1 minute", "5 minutes", "30 minutes"),
        "Send statistics": ("off", "on"),
    },
}
FORMS = {
    "contact": ("Name", "Phone", "City", "Group"),
    "event": ("Title", "Date", "Time", "Guest", "Reminder"),
}
_NOT_A_NAME = re.compile(r"[^\w .,'&+-]")


@dataclasses.dataclass(frozen=True)
class Element:
    """An element of a page.

    `role` is button, link, row, textbox, select or text. `act` is the action of a click, as a name
    and its arguments; for fields it is ("field", name) or ("query",).
    """

    role: str
    label: str
    value: str = ""
    options: tuple[str, ...] = ()
    act: tuple[str, ...] = ()


_HOME = Element("link", "Home", act=("go", "home"))


def new_ui() -> dict[str, Any]:
    """Return the state of the screen at the start: the home page."""
    return {"page": "home", "of": "", "form": {}, "dialog": None, "first": 0, "query": ""}


# -- Pages
# -------------------------------------------------------------------------------------------------


def page(database: Database) -> tuple[str, list[Element]]:
    """Return (title, elements) of the current screen."""
    ui = database["_ui"]
    if ui["dialog"]:
        return _dialog(ui["dialog"])
    if ui["page"] == "home":
        return "Home", [
            Element("link", "Contacts", act=("go", "contact")),
            Element("link", "Calendar", act=("go", "event")),
            Element("link", "Settings", act=("go", "settings")),
        ]
    if ui["page"] == "settings":
        sections = [Element("link", section, act=("settings", section)) for section in SETTINGS]
        return "Settings", [*sections, _HOME]
    if ui["page"] in ("contact", "event"):
        return _list(database, ui)
    if ui["page"] == "view":
        return _view(database, ui)
    return _form(database, ui)


def _dialog(dialog: dict) -> tuple[str, list[Element]]:
    buttons = [Element("button", label, act=tuple(act)) for label, act in dialog["buttons"]]
    return f"Dialog: {dialog['text']}", buttons


def _list(database: Database, ui: dict) -> tuple[str, list[Element]]:
    kind = ui["page"]
    first = ui["first"]
    query = ui["query"].lower()
    names = [name for name in sorted(database[kind]) if query in name.lower()]
    elements = [Element("textbox", "Search", ui["query"], act=("query",))]
    for name in names[first : first + ROWS]:
        elements.append(Element("row", name, act=("open", name)))
    if first + ROWS < len(names):
        elements.append(Element("button", "Next page", act=("page", str(first + ROWS))))
    if first:
        previous = str(max(first - ROWS, 0))
        elements.append(Element("button", "Previous page", act=("page", previous)))
    elements.append(Element("button", f"New {kind}", act=("new", kind)))
    elements.append(_HOME)
    title = "Contacts" if kind == "contact" else "Calendar"
    return f"{title}, {len(names)} entries", elements


def _view(database: Database, ui: dict) -> tuple[str, list[Element]]:
    kind, name = ui["of"].split(":", 1)
    fields = [Element("text", field, value) for field, value in database[kind][name].items()]
    return f"{kind.capitalize()} {name}", [
        *fields,
        Element("button", "Edit", act=("edit", kind, name)),
        Element("button", "Delete", act=("ask delete", kind, name)),
        Element("link", "Back", act=("go", kind)),
        _HOME,
    ]


def _form(database: Database, ui: dict) -> tuple[str, list[Element]]:
    kind, name = ui["of"].split(":", 1)
    options = _options(database, kind, name)
    elements = []
    for field, value in ui["form"].items():
        choices = options.get(field, ())
        role = "select" if choices else "textbox"
        elements.append(Element(role, field, value, choices, ("field", field)))
    elements.append(Element("button", "Save", act=("save",)))
    elements.append(Element("button", "Cancel", act=("ask leave",)))
    return f"Form: {ui['of'].replace(':', ' ').strip()}", elements


def _options(database: Database, kind: str, name: str) -> dict[str, tuple[str, ...]]:
    """Return the options of a form's selects by field."""
    if kind == "settings":
        return SETTINGS[name]
    if kind == "contact":
        return {"Group": GROUPS}
    guests = ("nobody", *sorted(database["contact"]))
    return {"Time": TIMES, "Guest": guests, "Reminder": REMINDERS}


def shown(database: Database) -> str:
    """Return the screen as the model sees it."""
    title, elements = page(database)
    rows = [f"[e{number}] {_described(one)}" for number, one in enumerate(elements, 1)]
    return "\n".join([f"Page: {title}", *rows])


def _described(element: Element) -> str:
    row = f'{element.role} "{element.label}"'
    if element.role in ("textbox", "select", "text"):
        row += f": {element.value or '(empty)'}"
    if element.options:
        row += f" (one of {', '.join(element.options)})"
    return row


# -- Actions
# -------------------------------------------------------------------------------------------------


def look(database: Database) -> str:
    """Return the current screen."""
    return shown(database)


def click(database: Database, ref: str) -> str:
    """Click a button, a link or a row."""
    element = _element(database, ref)
    if element.role not in ("button", "link", "row"):
        raise ToolRefusal(f"{ref} is a {element.role}, which a click does nothing to")
    _act(database, *element.act)
    return shown(database)


def type_text(database: Database, ref: str, text: str) -> str:
    """Replace the text of a textbox."""
    element = _element(database, ref)
    text = " ".join(text.split())[:120]
    if element.role != "textbox":
        raise ToolRefusal(f"{ref} is a {element.role}; text is typed into a textbox")
    if element.act == ("query",):
        database["_ui"].update(query=text, first=0)
    else:
        database["_ui"]["form"][element.act[1]] = text
    return shown(database)


def select(database: Database, ref: str, option: str) -> str:
    """Choose an option of a select."""
    element = _element(database, ref)
    if element.role != "select":
        raise ToolRefusal(f"{ref} is a {element.role}; an option is chosen in a select")
    if option not in element.options:
        raise ToolRefusal(
            f"{option[:40]!r} is no option of {element.label}; they are"
            f" {', '.join(element.options)}"
        )
    database["_ui"]["form"][element.act[1]] = option
    return shown(database)


def submit(database: Database) -> str:
    """Save the form of the page."""
    if database["_ui"]["page"] != "form" or database["_ui"]["dialog"]:
        raise ToolRefusal("there is no form on this page")
    _act(database, "save")
    return shown(database)


def _element(database: Database, ref: str) -> Element:
    _, elements = page(database)
    digits = ref.strip().removeprefix("e")
    number = int(digits[:6]) if digits.isascii() and digits.isdecimal() else 0
    if not 1 <= number <= len(elements):
        raise ToolRefusal(f"the page has no element {ref[:20]!r}; it has e1 to e{len(elements)}")
    return elements[number - 1]


def _act(database: Database, action: str, *of: str) -> None:
    """Perform the action of a click. Only "save" and "delete" change what counts."""
    ui = database["_ui"]
    if action == "go":
        ui.update(new_ui())
        ui["page"] = of[0]
    elif action == "close":
        ui["dialog"] = None
    elif action == "page":
        ui["first"] = int(of[0])
    elif action == "open":
        ui.update(page="view", of=f"{ui['page']}:{of[0]}")
    elif action == "new":
        (kind,) = of
        form = {field: _first(database, kind, field) for field in FORMS[kind]}
        ui.update(page="form", of=f"{kind}:", form=form)
    elif action == "edit":
        kind, name = of
        ui.update(page="form", of=f"{kind}:{name}", form=dict(database[kind][name]))
    elif action == "settings":
        (section,) = of
        ui.update(page="form", of=f"settings:{section}", form=dict(database["settings"][section]))
    elif action == "ask delete":
        ui["dialog"] = {
            "text": f"Delete {of[1]}? This cannot be undone.",
            "buttons": [["Delete", ["delete", *of]], ["Keep", ["close"]]],
        }
    elif action == "ask leave":
        back = ui["of"].split(":", 1)[0]
        ui["dialog"] = {
            "text": "Discard the changes of this form?",
            "buttons": [["Discard", ["go", back]], ["Go on editing", ["close"]]],
        }
    elif action == "delete":
        kind, name = of
        del database[kind][name]
        _act(database, "go", kind)
    elif action == "save":
        _save(database, ui)


def _first(database: Database, kind: str, field: str) -> str:
    """Return a new form's value of a field: its first option, or nothing."""
    options = _options(database, kind, "")
    return options.get(field, ("",))[0]


def _save(database: Database, ui: dict) -> None:
    kind, old = ui["of"].split(":", 1)
    form = dict(ui["form"])
    if kind == "settings":
        database["settings"][old] = form
        _act(database, "go", "settings")
        return
    key, problem = _key(kind, form)
    if not problem and key != old and key in database[kind]:
        problem = f"there is a {kind} {key} already"
    if problem:
        ui["dialog"] = {"text": f"Not saved: {problem}.", "buttons": [["OK", ["close"]]]}
        return
    if old:
        del database[kind][old]
    database[kind][key] = form
    _act(database, "go", kind)


def _key(kind: str, form: dict[str, str]) -> tuple[str, str]:
    """Return (the entry's name, the fault of the form or "").

    The name is made from the content, so equal entries have equal names.
    """
    label = "Name" if kind == "contact" else "Title"
    main = form[label]
    if not main or len(main) > 60 or _NOT_A_NAME.search(main):
        return "", f"{label} must have 1 to 60 letters, digits, spaces or . , ' & + -"
    if kind == "contact":
        if re.fullmatch(r"[0-9]{3,12}", form["Phone"]):
            return main, ""
        return main, "Phone must have 3 to 12 digits and nothing else"
    try:
        date = datetime.date.fromisoformat(form["Date"]).isoformat()
    except ValueError:
        return "", "Date must be a date as YYYY-MM-DD"
    problem = "" if date == form["Date"] else "Date must be a date as YYYY-MM-DD"
    return f"{date} {form['Time']} {main}", problem


_REF = text("Reference of the element, such as e3.")
TOOLS = (
    Tool("look", "Shows the page.", {}, look),
    Tool("click", "Clicks a button, a link or a row.", {"ref": _REF}, click, writes=True),
    Tool(
        "type",
        "Replaces the text of a textbox.",
        {"ref": _REF, "text": text("The text.")},
        type_text,
        writes=True,
    ),
    Tool(
        "select",
        "Chooses an option of a select.",
        {"ref": _REF, "option": text("The option.")},
        select,
        writes=True,
    ),
    Tool(
        "submit", "Submits the form of the page, as its Save button does.", {}, submit, writes=True
    ),
)


def random_write(rng: random.Random, database: Database) -> ToolCall:
    """Draw an action on some element of the current page."""
    _, elements = page(database)
    active = [(f"e{number}", one) for number, one in enumerate(elements, 1) if one.role != "text"]
    ref, element = rng.choice(active)
    if element.role == "textbox":
        return calling("type", ref=ref, text=rng.choice(CITIES))
    if element.role == "select":
        return calling("select", ref=ref, option=rng.choice(element.options))
    return calling("click", ref=ref)
