"""Scenarios of the GUI world: one to four requests to an organiser, each done by a driver that
finds its elements by their labels.

easy: a change of a setting or of a contact. medium: two requests, new entries and deletions among
them. hard: three or four, with moved events and questions whose answer has to be told.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

from envs.gem import ToolCall
from envs.worlds.base import Scenario, attempts, calling, prove, turns
from envs.worlds.gui import GROUPS, REMINDERS, SETTINGS, TIMES, TOOLS, new_ui, page
from envs.worlds.names import CITIES, draw_date, people
from envs.worlds.shop_scenarios import Request
from envs.worlds.tools import Database, Toolbox
from envs.worlds.user import Fact, UserScript

TITLES = (
    "Dentist",
    "Team meeting",
    "Yoga",
    "Piano lesson",
    "Budget review",
    "Haircut",
    "Book club",
    "Car service",
    "Lunch",
    "Interview",
    "Swimming",
    "Choir",
)
_ASKS = {
    "Phone": ("phone", "number"),
    "Date": ("date", "day", "when"),
    "Time": ("time", "when"),
    "Guest": ("guest", "invite", "who"),
}


class Driver:
    """Somebody at the screen: acts by label on a copy of the database, and keeps the calls."""

    def __init__(self, database: Database) -> None:
        self.database = copy.deepcopy(database)
        self.calls = []
        self._box = Toolbox(TOOLS)

    def do(self, name: str, label: str, **arguments: str) -> None:
        _, elements = page(self.database)
        (ref,) = [
            f"e{number}"
            for number, one in enumerate(elements, 1)
            if one.label == label and one.role != "text"
        ]
        self.act(calling(name, ref=ref, **arguments))

    def act(self, call: ToolCall) -> None:
        self._box.call(self.database, call)
        self.calls.append(call)

    def click(self, *labels: str) -> None:
        for label in labels:
            self.do("click", label)

    def open(self, app: str, words: str, entry: str) -> None:
        """Finds an entry by words that the user said, from wherever no dialog and no form is open."""
        self.home()
        self.click(app)
        self.do("type", "Search", text=words)
        self.click(entry)

    def home(self) -> None:
        if self.database["_ui"]["page"] != "home":
            self.click("Home")

    def fill(self, **fields: str) -> None:
        """Fields by label (an underscore is a space), then Save."""
        roles = {one.label: one.role for one in page(self.database)[1]}
        for name, value in fields.items():
            label = name.replace("_", " ")
            self.do(
                *(("select", label) if roles[label] == "select" else ("type", label)),
                **{"option" if roles[label] == "select" else "text": value},
            )
        self.act(calling("submit"))

    def taken(self) -> tuple[ToolCall, ...]:
        calls = tuple(self.calls)
        self.calls = []
        return calls


def make_scenario(rng: random.Random, level: str) -> Scenario:
    for draw in attempts(rng):
        database = _new_organiser(draw)
        kinds = {
            "easy": lambda: [draw.choice(EASY)],
            "medium": lambda: draw.sample(EASY + MORE, 2),
            "hard": lambda: (
                draw.sample(EASY, 1) + draw.sample(MORE, draw.randint(1, 2)) + [_question]
            ),
        }[level]()
        driver = Driver(database)
        used = set()
        requests = [kind(draw, driver, used) for kind in kinds]
        known = tuple(fact for request in requests for fact in request.facts)
        words = [word for fact in known for word in fact.words]
        if len(set(words)) < len(words):  # two facts that the same question asks for
            continue
        says = (
            f"Hello. {requests[0].says}",
            *(f"Thanks. Now: {request.says}" for request in requests[1:]),
        )
        return prove(
            TOOLS,
            Scenario(
                database,
                UserScript(says, known),
                tuple(call for request in requests for call in request.golden),
                tuple(fact for request in requests for fact in request.tell),
                turns(
                    calling("look"),
                    *(step for request in requests for step in request.demonstration),
                ),
            ),
        )


def _new_organiser(rng: random.Random) -> Database:
    contacts = {
        f"{first} {last}": {
            "Name": f"{first} {last}",
            "Phone": f"{rng.randrange(10**6, 10**7)}",
            "City": rng.choice(CITIES),
            "Group": rng.choice(GROUPS),
        }
        for first, last, _ in people(rng, 12)
    }
    events = {}
    for title in rng.sample(TITLES, 9):
        date = draw_date(rng)
        time = rng.choice(TIMES)
        events[f"{date} {time} {title}"] = {
            "Title": title,
            "Date": date,
            "Time": time,
            "Guest": rng.choice(["nobody", *sorted(contacts)]),
            "Reminder": rng.choice(REMINDERS),
        }
    settings = {
        section: {name: rng.choice(options) for name, options in fields.items()}
        for section, fields in SETTINGS.items()
    }
    return {"contact": contacts, "event": events, "settings": settings, "_ui": new_ui()}


# -- kinds of requests: each acts through the driver, so that the next one starts where it ended
# -------------------------------------------------------------------------------------------------


def _setting(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    section = rng.choice(sorted(SETTINGS))
    name = rng.choice(sorted(SETTINGS[section]))
    value = rng.choice(
        [
            one
            for one in SETTINGS[section][name]
            if one != driver.database["settings"][section][name]
        ]
    )
    driver.home()
    driver.click("Settings", section)
    driver.fill(**{name.replace(" ", "_"): value})
    return _done(driver, f"Please set {name.lower()} to {value}.")


def _contact(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    """A contact moves, changes the group, or has a new number, which is told when asked for."""
    entry = _draw(rng, driver.database["contact"], used)
    field = rng.choice(["Phone", "City", "Group"])
    old = driver.database["contact"][entry][field]
    value = (
        f"{rng.randrange(10**6, 10**7)}"
        if field == "Phone"
        else rng.choice([one for one in (CITIES if field == "City" else GROUPS) if one != old])
    )
    driver.open("Contacts", entry, entry)
    driver.click("Edit")
    driver.fill(**{field: value})
    if field != "Phone":
        return _done(
            driver,
            f"{entry} {'has moved to' if field == 'City' else 'belongs to the group'} {value}."
            " Please correct the contact.",
        )
    known = Fact(_ASKS["Phone"], f"{entry}'s new number is {value}.")
    return _done(
        driver,
        f"{entry} has a new phone number. Please correct the contact.",
        (known,),
        "What is the new phone number?",
    )


def _new_contact(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    first, last, _ = rng.choice(
        [one for one in people(rng, 30) if f"{one[0]} {one[1]}" not in driver.database["contact"]]
    )
    name = f"{first} {last}"
    phone = f"{rng.randrange(10**6, 10**7)}"
    city = rng.choice(CITIES)
    group = rng.choice(GROUPS)
    used.add(name)
    driver.home()
    driver.click("Contacts", "New contact")
    driver.fill(Name=name, Phone=phone, City=city, Group=group)
    return _done(
        driver,
        f"Please add {name} of {city} to my contacts, in the group {group}.",
        (Fact(_ASKS["Phone"], f"{first}'s number is {phone}."),),
        f"What is the phone number of {name}?",
    )


def _new_event(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    title = rng.choice(
        [
            one
            for one in TITLES
            if all(event["Title"] != one for event in driver.database["event"].values())
        ]
    )
    date = draw_date(rng)
    time = rng.choice(TIMES)
    guest = _draw(rng, driver.database["contact"], used)
    reminder = rng.choice(REMINDERS)
    driver.home()
    driver.click("Calendar", "New event")
    driver.fill(Title=title, Date=date, Time=time, Guest=guest, Reminder=reminder)
    used.add(f"{date} {time} {title}")
    return _done(
        driver,
        f'Please put "{title}" with {guest} into my calendar,'
        f" {'with the reminder ' + reminder if reminder != 'none' else 'without a reminder'}.",
        (Fact(("date", "day", "when", "time"), f"It is on {date} at {time}."),),
        f"When is {title}?",
    )


def _moved_event(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    entry = _draw(rng, driver.database["event"], used)
    event = driver.database["event"][entry]
    time = rng.choice([one for one in TIMES if one != event["Time"]])
    driver.open("Calendar", event["Title"], entry)
    driver.click("Edit")
    driver.fill(Time=time)
    used.add(f"{event['Date']} {time} {event['Title']}")
    return _done(
        driver,
        f"{event['Title']} on {event['Date']} is at {time} now; all else stays. Please correct the"
        " calendar.",
    )


def _deletion(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    entry = _draw(rng, driver.database["event"], used)
    event = driver.database["event"][entry]
    driver.open("Calendar", event["Title"], entry)
    driver.click("Delete", "Delete")
    return _done(
        driver, f"{event['Title']} does not take place. Please delete it from the calendar."
    )


def _question(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    """Nothing is to be changed: a date has to be told, which no guess finds."""
    entry = _draw(rng, driver.database["event"], used)
    event = driver.database["event"][entry]
    driver.open("Calendar", event["Title"], entry)
    return Request(
        f"On which day, as YYYY-MM-DD, and at what time is {event['Title']}?",
        (),
        (event["Date"], event["Time"]),
        (*driver.taken(), f"{event['Title']} is on {event['Date']} at {event['Time']}."),
    )


def _draw(rng: random.Random, table: dict[str, dict], used: set[str]) -> str:
    """An entry that no other request of this dialogue is about."""
    entry = rng.choice([one for one in sorted(table) if one not in used])
    used.add(entry)
    return entry


def _done(driver: Driver, says: str, known: tuple[Fact, ...] = (), question: str = "") -> Request:
    calls = driver.taken()
    return Request(
        says, calls, (), (*((question,) if question else ()), *calls, "That is done."), known
    )


Kind = Callable[[random.Random, Driver, set[str]], Request]
EASY: list[Kind] = [_setting, _contact]
MORE: list[Kind] = [_new_contact, _new_event, _moved_event, _deletion]
