"""Scenarios of the GUI world: one to four requests to an organiser.

A driver carries out each request and finds the elements by their labels. easy: a change of a
setting or of a contact. medium: two requests, also new entries and deletions. hard: three or four,
also moved events and a question whose answer must be told.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

from envs.gem import ToolCall
from envs.worlds.gui import GROUPS, REMINDERS, SETTINGS, TIMES, TOOLS, new_ui, page
from envs.worlds.names import CITIES, draw_date, people
from envs.worlds.scenario import Request, Scenario, attempts, calling, joined, prove
from envs.worlds.tools import Database, Toolbox
from envs.worlds.user import Fact

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
    """A scripted person at the screen.

    The driver acts by label on a copy of the database and keeps the calls.
    """

    def __init__(self, database: Database) -> None:
        self.database = copy.deepcopy(database)
        self.calls: list[ToolCall] = []
        self._box = Toolbox(TOOLS)

    def do(self, name: str, label: str, **arguments: str) -> None:
        """Call a tool on the only element with this label."""
        _, elements = page(self.database)
        references = []
        for number, one in enumerate(elements, 1):
            if one.label == label and one.role != "text":
                references.append(f"e{number}")
        (reference,) = references
        self.act(calling(name, ref=reference, **arguments))

    def act(self, call: ToolCall) -> None:
        """Run a call and keep it."""
        self._box.call(self.database, call)
        self.calls.append(call)

    def click(self, *labels: str) -> None:
        """Click the elements with these labels in order."""
        for label in labels:
            self.do("click", label)

    def open(self, app: str, words: str, entry: str) -> None:
        """Find an entry by words that the user said, from any page without a form or a dialog."""
        self.home()
        self.click(app)
        self.do("type", "Search", text=words)
        self.click(entry)

    def home(self) -> None:
        """Go to the home page."""
        if self.database["_ui"]["page"] != "home":
            self.click("Home")

    def fill(self, **fields: str) -> None:
        """Fill in fields by label (an underscore stands for a space) and save the form."""
        roles = {one.label: one.role for one in page(self.database)[1]}
        for name, value in fields.items():
            label = name.replace("_", " ")
            if roles[label] == "select":
                self.do("select", label, option=value)
            else:
                self.do("type", label, text=value)
        self.act(calling("submit"))

    def taken(self) -> tuple[ToolCall, ...]:
        """Return the calls so far and forget them."""
        calls = tuple(self.calls)
        self.calls = []
        return calls


def make_scenario(rng: random.Random, level: str) -> Scenario:
    """Draw a scenario of this level."""
    for draw in attempts(rng):
        database = _new_organiser(draw)
        kinds = _draw_kinds(draw, level)
        driver = Driver(database)
        used: set[str] = set()
        requests = [kind(draw, driver, used) for kind in kinds]
        words = [word for request in requests for fact in request.facts for word in fact.words]
        if len(set(words)) < len(words):  # one question would ask for two facts
            continue
        return prove(TOOLS, joined(database, requests, [calling("look")], "Thanks. Now:"))
    raise AssertionError("attempts() ends with an error")


def _draw_kinds(rng: random.Random, level: str) -> list[Kind]:
    if level == "easy":
        return [rng.choice(EASY)]
    if level == "medium":
        return rng.sample(EASY + MORE, 2)
    return rng.sample(EASY, 1) + rng.sample(MORE, rng.randint(1, 2)) + [_question]


def _new_organiser(rng: random.Random) -> Database:
    contacts = {}
    for first, last, _ in people(rng, 12):
        contacts[f"{first} {last}"] = {
            "Name": f"{first} {last}",
            "Phone": _draw_phone(rng),
            "City": rng.choice(CITIES),
            "Group": rng.choice(GROUPS),
        }
    guests = ["nobody", *sorted(contacts)]
    events = {}
    for title in rng.sample(TITLES, 9):
        date = draw_date(rng)
        time = rng.choice(TIMES)
        events[f"{date} {time} {title}"] = {
            "Title": title,
            "Date": date,
            "Time": time,
            "Guest": rng.choice(guests),
            "Reminder": rng.choice(REMINDERS),
        }
    settings = {
        section: {name: rng.choice(options) for name, options in fields.items()}
        for section, fields in SETTINGS.items()
    }
    return {"contact": contacts, "event": events, "settings": settings, "_ui": new_ui()}


def _draw_phone(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


# -- Kinds of requests. Each acts through the driver, so that the next one starts where it ended.
# -------------------------------------------------------------------------------------------------


def _setting(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    section = rng.choice(sorted(SETTINGS))
    options = SETTINGS[section]
    name = rng.choice(sorted(options))
    now = driver.database["settings"][section][name]
    value = rng.choice([option for option in options[name] if option != now])
    driver.home()
    driver.click("Settings", section)
    driver.fill(**{name.replace(" ", "_"): value})
    return _done(driver, f"Please set {name.lower()} to {value}.")


def _contact(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    """Draw a contact that moves, changes its group or gets a new number.

    The number is told when asked for.
    """
    entry = _draw(rng, driver.database["contact"], used)
    field = rng.choice(["Phone", "City", "Group"])
    old = driver.database["contact"][entry][field]
    if field == "Phone":
        value = _draw_phone(rng)
    else:
        options = CITIES if field == "City" else GROUPS
        value = rng.choice([one for one in options if one != old])
    driver.open("Contacts", entry, entry)
    driver.click("Edit")
    driver.fill(**{field: value})
    if field != "Phone":
        change = "has moved to" if field == "City" else "belongs to the group"
        return _done(driver, f"{entry} {change} {value}. Please correct the contact.")
    known = Fact(_ASKS["Phone"], f"{entry}'s new number is {value}.")
    return _done(
        driver,
        f"{entry} has a new phone number. Please correct the contact.",
        (known,),
        "What is the new phone number?",
    )


def _new_contact(rng: random.Random, driver: Driver, used: set[str]) -> Request:
    known = driver.database["contact"]
    new = [one for one in people(rng, 30) if f"{one[0]} {one[1]}" not in known]
    first, last, _ = rng.choice(new)
    name = f"{first} {last}"
    phone = _draw_phone(rng)
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
    titles = {event["Title"] for event in driver.database["event"].values()}
    title = rng.choice([one for one in TITLES if one not in titles])
    date = draw_date(rng)
    time = rng.choice(TIMES)
    guest = _draw(rng, driver.database["contact"], used)
    reminder = rng.choice(REMINDERS)
    driver.home()
    driver.click("Calendar", "New event")
    driver.fill(Title=title, Date=date, Time=time, Guest=guest, Reminder=reminder)
    used.add(f"{date} {time} {title}")
    with_reminder = "without a reminder"
    if reminder != "none":
        with_reminder = f"with the reminder {reminder}"
    return _done(
        driver,
        f'Please put "{title}" with {guest} into my calendar, {with_reminder}.',
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
    """Draw a question about a date; nothing is to be changed, and no guess finds the date."""
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
    """Draw an entry that no other request of this dialogue is about."""
    entry = rng.choice([one for one in sorted(table) if one not in used])
    used.add(entry)
    return entry


def _done(driver: Driver, says: str, known: tuple[Fact, ...] = (), question: str = "") -> Request:
    """Return the request that the driver's calls fulfil, with a question that comes first."""
    calls = driver.taken()
    first = (question,) if question else ()
    return Request(says, calls, (), (*first, *calls, "That is done."), known)


Kind = Callable[[random.Random, Driver, set[str]], Request]
EASY: list[Kind] = [_setting, _contact]
MORE: list[Kind] = [_new_contact, _new_event, _moved_event, _deletion]
