"""The GUI world's system: an organiser as a text DOM. Contacts, a calendar and settings, with
lists, forms, dialogs and pages.

A page is a list of elements with references e1, e2, ... that hold until the next action. What is on
the screen lives in the database's "_ui", which does not count; a change counts once its form is
saved. A dialog is modal: while it is open the page has only its buttons.
"""

from __future__ import annotations

import dataclasses
import datetime
import random
import re
from typing import Any

from envs.gem import ToolCall
from envs.worlds.base import calling
from envs.worlds.names import CITIES, clock
from envs.worlds.tools import Database, Tool, ToolRefusal, text

POLICY = """\
You operate an organiser for its user, by the elements of its pages. Rules:
1. `look` shows the page. References such as e3 hold until the next action; each action shows the page that it leads to.
2. A form changes nothing until it is saved. Lists show five entries at a time and have a search box.
3. Do what the user asks for and nothing else. Ask for what you need to know, and tell the user what was asked."""

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
    """role: button, link, row, textbox, select or text. act: what a click does, a name and its
    argument; for fields the name of the field.
    """

    role: str
    label: str
    value: str = ""
    options: tuple[str, ...] = ()
    act: tuple[str, ...] = ()


def new_ui() -> dict[str, Any]:
    return {"page": "home", "of": "", "form": {}, "dialog": None, "first": 0, "query": ""}


# -- pages: what is on the screen
# -------------------------------------------------------------------------------------------------


def page(database: Database) -> tuple[str, list[Element]]:
    """(title, elements) of the screen as it is."""
    ui = database["_ui"]
    if ui["dialog"]:
        return f"Dialog: {ui['dialog']['text']}", [
            Element("button", label, act=act)
            for label, act in ((one[0], tuple(one[1])) for one in ui["dialog"]["buttons"])
        ]
    home = Element("link", "Home", act=("go", "home"))
    if ui["page"] == "home":
        return "Home", [
            Element("link", label, act=("go", name))
            for label, name in (
                ("Contacts", "contact"),
                ("Calendar", "event"),
                ("Settings", "settings"),
            )
        ]
    if ui["page"] == "settings":
        return "Settings", [
            *(Element("link", section, act=("settings", section)) for section in SETTINGS),
            home,
        ]
    if ui["page"] in ("contact", "event"):
        return _list(database, ui, home)
    if ui["page"] == "view":
        return _view(database, ui, home)
    return _form(database, ui)


def _list(database: Database, ui: dict, home: Element) -> tuple[str, list[Element]]:
    kind = ui["page"]
    names = [name for name in sorted(database[kind]) if ui["query"].lower() in name.lower()]
    shown = names[ui["first"] : ui["first"] + ROWS]
    elements = [
        Element("textbox", "Search", ui["query"], act=("query",)),
        *(Element("row", name, act=("open", name)) for name in shown),
    ]
    if ui["first"] + ROWS < len(names):
        elements.append(Element("button", "Next page", act=("page", str(ui["first"] + ROWS))))
    if ui["first"]:
        elements.append(
            Element("button", "Previous page", act=("page", str(max(ui["first"] - ROWS, 0))))
        )
    title = "Contacts" if kind == "contact" else "Calendar"
    return f"{title}, {len(names)} entries", [
        *elements,
        Element("button", f"New {kind}", act=("new", kind)),
        home,
    ]


def _view(database: Database, ui: dict, home: Element) -> tuple[str, list[Element]]:
    kind, name = ui["of"].split(":", 1)
    fields = [Element("text", field, value) for field, value in database[kind][name].items()]
    return f"{kind.capitalize()} {name}", [
        *fields,
        Element("button", "Edit", act=("edit", kind, name)),
        Element("button", "Delete", act=("ask delete", kind, name)),
        Element("link", "Back", act=("go", kind)),
        home,
    ]


def _form(database: Database, ui: dict) -> tuple[str, list[Element]]:
    kind = ui["of"].split(":", 1)[0]
    options = _options(database, kind, ui["of"].split(":", 1)[1])
    elements = [
        Element(
            "select" if options.get(field) else "textbox",
            field,
            value,
            options.get(field, ()),
            ("field", field),
        )
        for field, value in ui["form"].items()
    ]
    return f"Form: {ui['of'].replace(':', ' ').strip()}", [
        *elements,
        Element("button", "Save", act=("save",)),
        Element("button", "Cancel", act=("ask leave",)),
    ]


def _options(database: Database, kind: str, name: str) -> dict[str, tuple[str, ...]]:
    if kind == "settings":
        return SETTINGS[name]
    return (
        {"Group": GROUPS}
        if kind == "contact"
        else {
            "Time": TIMES,
            "Guest": ("nobody", *sorted(database["contact"])),
            "Reminder": REMINDERS,
        }
    )


def shown(database: Database) -> str:
    """The screen as the model sees it."""
    title, elements = page(database)
    lines = [
        f'[e{number}] {one.role} "{one.label}"'
        + (f": {one.value or '(empty)'}" if one.role in ("textbox", "select", "text") else "")
        + (f" (one of {', '.join(one.options)})" if one.options else "")
        for number, one in enumerate(elements, 1)
    ]
    return "\n".join([f"Page: {title}", *lines])


# -- actions
# -------------------------------------------------------------------------------------------------


def look(database: Database) -> str:
    return shown(database)


def click(database: Database, ref: str) -> str:
    element = _element(database, ref)
    if element.role not in ("button", "link", "row"):
        raise ToolRefusal(f"{ref} is a {element.role}, which a click does nothing to")
    _act(database, *element.act)
    return shown(database)


def type_text(database: Database, ref: str, text: str) -> str:
    """What was in the box is replaced."""
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
    if database["_ui"]["page"] != "form" or database["_ui"]["dialog"]:
        raise ToolRefusal("there is no form on this page")
    _act(database, "save")
    return shown(database)


def _element(database: Database, ref: str) -> Element:
    elements = page(database)[1]
    digits = ref.strip().removeprefix("e")
    if not digits.isascii() or not digits.isdecimal() or not 1 <= int(digits[:6]) <= len(elements):
        raise ToolRefusal(f"the page has no element {ref[:20]!r}; it has e1 to e{len(elements)}")
    return elements[int(digits[:6]) - 1]


def _act(database: Database, action: str, *of: str) -> None:
    """What a click does. Only "save" and "delete" change what counts."""
    ui = database["_ui"]
    if action in ("go", "close"):
        ui.update(new_ui() if action == "go" else {"dialog": None})
        ui["page"] = of[0] if action == "go" else ui["page"]
    elif action == "page":
        ui["first"] = int(of[0])
    elif action == "open":
        ui.update(page="view", of=f"{ui['page']}:{of[0]}")
    elif action == "new":
        ui.update(
            page="form",
            of=f"{of[0]}:",
            form={field: _first(database, of[0], field) for field in FORMS[of[0]]},
        )
    elif action == "edit":
        ui.update(page="form", of=f"{of[0]}:{of[1]}", form=dict(database[of[0]][of[1]]))
    elif action == "settings":
        ui.update(page="form", of=f"settings:{of[0]}", form=dict(database["settings"][of[0]]))
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
        del database[of[0]][of[1]]
        _act(database, "go", of[0])
    elif action == "save":
        _save(database, ui)


def _first(database: Database, kind: str, field: str) -> str:
    return _options(database, kind, "").get(field, ("",))[0]


def _save(database: Database, ui: dict) -> None:
    kind, old = ui["of"].split(":", 1)
    if kind == "settings":
        database["settings"][old] = dict(ui["form"])
        return _act(database, "go", "settings")
    key, problem = _key(kind, ui["form"])
    if not problem and key != old and key in database[kind]:
        problem = f"there is a {kind} {key} already"
    if problem:
        ui["dialog"] = {"text": f"Not saved: {problem}.", "buttons": [["OK", ["close"]]]}
        return None
    if old:
        del database[kind][old]
    database[kind][key] = dict(ui["form"])
    return _act(database, "go", kind)


def _key(kind: str, form: dict[str, str]) -> tuple[str, str]:
    """(the entry's name, what is wrong with the form or "").

    The name says what the entry is, so that equal entries are the same entry.
    """
    main = form["Name" if kind == "contact" else "Title"]
    if not main or len(main) > 60 or _NOT_A_NAME.search(main):
        return (
            "",
            (
                f"{'Name' if kind == 'contact' else 'Title'} must have 1 to 60 letters, digits,"
                " spaces or . , ' & + -"
            ),
        )
    if kind == "contact":
        return main, (
            ""
            if re.fullmatch(r"[0-9]{3,12}", form["Phone"])
            else "Phone must have 3 to 12 digits and nothing else"
        )
    try:
        date = datetime.date.fromisoformat(form["Date"]).isoformat()
    except ValueError:
        return "", "Date must be a date as YYYY-MM-DD"
    return f"{date} {form['Time']} {main}", (
        "" if date == form["Date"] else "Date must be a date as YYYY-MM-DD"
    )


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
    """Some action on some element of the page as it is."""
    elements = page(database)[1]
    ref, element = rng.choice(
        [(f"e{number}", one) for number, one in enumerate(elements, 1) if one.role != "text"]
    )
    if element.role == "textbox":
        return calling("type", ref=ref, text=rng.choice(CITIES))
    if element.role == "select":
        return calling("select", ref=ref, option=rng.choice(element.options))
    return calling("click", ref=ref)
