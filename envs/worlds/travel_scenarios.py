"""Scenarios of the travel world: a trip with conditions that exactly one choice fulfils.

easy: one flight. medium: a return trip with a hotel, within a budget. hard: two cities, a budget
that is told only when asked for, then an old booking that may or may not be cancelled.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from envs.gem import ToolCall
from envs.worlds.names import CITIES, clock, day, draw_date, number, people
from envs.worlds.scenario import Request, Scenario, attempts, calling, prove, turns
from envs.worlds.tools import Database
from envs.worlds.travel import TOOLS
from envs.worlds.user import UserScript, facts

AIRLINES = ("Aero", "Boreal", "Cirrus", "Delta Wing", "Euroline")
HOTELS = (
    "Astor",
    "Bellevue",
    "Central",
    "Grand",
    "Harbour",
    "Imperial",
    "Mirador",
    "Palace",
    "Plaza",
    "Royal",
    "Station",
    "Victoria",
)


@dataclasses.dataclass(frozen=True)
class Leg:
    """A wanted flight: how the user describes it, and the only id that fulfils the wish."""

    origin: str
    destination: str
    date: str
    wish: str
    flight_id: str
    price: int


def make_scenario(rng: random.Random, level: str) -> Scenario:
    """Draw a scenario of this level."""
    draw_scenario = {"easy": _easy, "medium": _medium, "hard": _hard}[level]
    for draw in attempts(rng):
        scenario = draw_scenario(draw)
        if scenario is not None:
            return prove(TOOLS, scenario)
    raise AssertionError("attempts() ends with an error")


def _new_database(rng: random.Random) -> tuple[Database, str]:
    """Return a database without flights and hotels, and the id of the traveller who asks."""
    database: Database = {"travellers": {}, "flights": {}, "hotels": {}, "bookings": {}}
    for first, last, email in people(rng, 4):
        database["travellers"][number(rng, "T", database["travellers"], 3)] = {
            "name": f"{first} {last}",
            "email": email,
            "balance": rng.randrange(6000, 9000),
        }
    return database, rng.choice(sorted(database["travellers"]))


def _add_flights(
    rng: random.Random, database: Database, origin: str, destination: str, date: str
) -> list[str]:
    added = []
    for _ in range(rng.randint(5, 7)):
        departs = 5 * rng.randrange(60, 260)
        takes = 5 * rng.randrange(14, 40)
        identity = number(rng, "F", database["flights"])
        database["flights"][identity] = {
            "origin": origin,
            "destination": destination,
            "date": date,
            "departs": clock(departs),
            "arrives": clock(min(departs + takes, 1435)),
            "airline": rng.choice(AIRLINES),
            "fare": rng.choice(["flex", "saver"]),
            "price": rng.randrange(60, 480),
            "seats": rng.choice([0, 1, 2, 5, 9]),
        }
        added.append(identity)
    return added


def _draw_leg(
    rng: random.Random, database: Database, origin: str, destination: str, date: str
) -> Leg | None:
    """Add a day's flights and draw a wish.

    Returns None where no flight fulfils the wish or two do equally well.
    """
    ids = _add_flights(rng, database, origin, destination, date)
    _add_flights(rng, database, origin, destination, day(date, 1))  # of the wrong day
    flights = {identity: database["flights"][identity] for identity in ids}
    hour = clock(60 * rng.randint(8, 14))
    cap = rng.randrange(150, 400)
    wish, condition, order = rng.choice(
        [
            (
                f"the cheapest flight that departs at {hour} or later",
                lambda one: one["departs"] >= hour,
                _by_price,
            ),
            (
                f"the flight that arrives earliest among those of at most {cap} euros",
                lambda one: one["price"] <= cap,
                lambda one: one["arrives"],
            ),
            (
                "the cheapest flight with the fare flex that arrives before 19:00",
                lambda one: one["fare"] == "flex" and one["arrives"] < "19:00",
                _by_price,
            ),
            (
                f"the latest departure among flights of at most {cap} euros",
                lambda one: one["price"] <= cap,
                lambda one: tuple(-ord(letter) for letter in one["departs"]),
            ),
        ]
    )
    chosen = _only_best(flights, lambda one: condition(one) and one["seats"] > 0, order)
    if chosen is None:
        return None
    wish = f"{wish} (it must have a free seat)"
    return Leg(origin, destination, date, wish, chosen, flights[chosen]["price"])


def _by_price(flight: dict) -> int:
    return flight["price"]


def _only_best(
    table: dict[str, dict], condition: Callable[[dict], bool], order: Callable
) -> str | None:
    """Return the entry that comes first among those that fulfil the condition.

    Returns None where there is no such entry or no single best one.
    """
    fit = sorted((order(entry), identity) for identity, entry in table.items() if condition(entry))
    if not fit or (len(fit) > 1 and fit[0][0] == fit[1][0]):
        return None
    return fit[0][1]


def _add_hotels(rng: random.Random, database: Database, city: str) -> dict[str, dict]:
    added = {}
    names = rng.sample(HOTELS, 6)
    ratings = rng.sample(range(60, 99), 6)
    for name, rating in zip(names, ratings, strict=True):
        identity = number(rng, "H", database["hotels"])
        added[identity] = {
            "name": f"{name} {city}",
            "city": city,
            "stars": rng.randint(2, 5),
            "rating": rating / 10,
            "breakfast": rng.random() < 0.6,
            "price_per_night": rng.randrange(50, 280),
        }
    database["hotels"].update(added)
    return added


def _within_budget(
    rng: random.Random, hotels: dict[str, dict], stars: int, nights: int, rest: int
) -> tuple[str, int] | None:
    """Draw a hotel and a budget that make it the best rated one within the budget.

    Returns:
      (hotel, budget), or None where the draw fails. The budget covers the hotel and `rest`; only
        hotels
      with at least `stars` stars count.
    """
    fit = {identity: hotel for identity, hotel in hotels.items() if hotel["stars"] >= stars}
    if len(fit) < 2:
        return None
    chosen = rng.choice(sorted(fit))
    price = fit[chosen]["price_per_night"] * nights
    room = 40  # by how much the budget may exceed the costs
    for hotel in fit.values():
        if hotel["rating"] > fit[chosen]["rating"]:
            room = min(room, hotel["price_per_night"] * nights - price)
    if room <= 0:
        return None
    return chosen, rest + price + rng.randrange(room)


# -- Levels
# -------------------------------------------------------------------------------------------------


def _easy(rng: random.Random) -> Scenario | None:
    database, traveller = _new_database(rng)
    origin, destination = rng.sample(CITIES, 2)
    leg = _draw_leg(rng, database, origin, destination, draw_date(rng))
    if leg is None:
        return None
    _add_hotels(rng, database, destination)
    email = database["travellers"][traveller]["email"]
    request = (
        f"Hello, I need to fly from {origin} to {destination} on {leg.date}. Please book"
        f" {leg.wish}."
    )
    booking = calling("book_flight", traveller_id=traveller, flight_id=leg.flight_id)
    demonstration = turns(
        *_identify(email),
        _look(leg),
        booking,
        f"Your flight {leg.flight_id} is booked. The sum is {leg.price} euros.",
    )
    return Scenario(
        database,
        UserScript((request,), _facts(email)),
        (booking,),
        (str(leg.price),),
        demonstration,
    )


def _medium(rng: random.Random) -> Scenario | None:
    database, traveller = _new_database(rng)
    home, city = rng.sample(CITIES, 2)
    date = draw_date(rng)
    nights = rng.randint(2, 4)
    stars = rng.randint(2, 4)
    out = _draw_leg(rng, database, home, city, date)
    back = _draw_leg(rng, database, city, home, day(date, nights))
    if out is None or back is None:
        return None
    flights = out.price + back.price
    hotels = _add_hotels(rng, database, city)
    found = _within_budget(rng, hotels, stars, nights, flights)
    if found is None:
        return None
    hotel, budget = found
    total = flights + hotels[hotel]["price_per_night"] * nights
    email = database["travellers"][traveller]["email"]
    request = (
        f"Hi, please plan my trip from {home} to {city}. I fly there on {date}: {out.wish}. I fly"
        f" back on {back.date}: {back.wish}. For the {nights} nights I want the best rated hotel"
        f" with at least {stars} stars that keeps the whole trip within my budget of {budget}"
        " euros."
    )
    golden = (
        *_book_legs(traveller, out, back),
        _book_hotel(traveller, hotel, date, nights),
    )
    demonstration = turns(
        *_identify(email),
        _look(out),
        _look(back),
        calling("search_hotels", city=city, min_stars=stars),
        *golden,
        f"Both flights and the hotel are booked. The sum is {total} euros.",
    )
    return Scenario(
        database, UserScript((request,), _facts(email)), golden, (str(total),), demonstration
    )


def _hard(rng: random.Random) -> Scenario | None:
    database, traveller = _new_database(rng)
    home, first, second = rng.sample(CITIES, 3)
    date = draw_date(rng)
    first_nights = rng.randint(2, 3)
    second_nights = rng.randint(2, 3)
    stars = rng.randint(2, 4)
    onward = day(date, first_nights)
    home_again = day(date, first_nights + second_nights)
    legs = [
        _draw_leg(rng, database, home, first, date),
        _draw_leg(rng, database, first, second, onward),
        _draw_leg(rng, database, second, home, home_again),
    ]
    if None in legs:
        return None
    second_hotels = _add_hotels(rng, database, second)
    inn = _only_best(
        second_hotels,
        lambda one: one["breakfast"] and one["stars"] >= 3,
        lambda one: one["price_per_night"],
    )
    if inn is None:
        return None
    flights = sum(leg.price for leg in legs)
    fixed = flights + second_hotels[inn]["price_per_night"] * second_nights
    first_hotels = _add_hotels(rng, database, first)
    found = _within_budget(rng, first_hotels, stars, first_nights, fixed)
    if found is None or found[1] > 4500:
        return None
    hotel, budget = found
    total = fixed + first_hotels[hotel]["price_per_night"] * first_nights
    email = database["travellers"][traveller]["email"]
    cancellation = _cancellation(rng, database, traveller, home)
    request = (
        f"Good morning. I travel from {home} to {first} on {date}, on to {second} on {onward}"
        f" and home on {home_again}. Flights: first {legs[0].wish}; then {legs[1].wish}; last"
        f" {legs[2].wish}. In {second} I want the cheapest hotel with breakfast and at least 3"
        f" stars, in {first} the best rated hotel with at least {stars} stars that keeps the whole"
        " trip within my budget."
    )
    booked = (
        *_book_legs(traveller, *legs),
        _book_hotel(traveller, hotel, date, first_nights),
        _book_hotel(traveller, inn, onward, second_nights),
    )
    demonstration = turns(
        "Could you tell me your email and your budget?",
        calling("find_traveller", email=email),
        *map(_look, legs),
        calling("search_hotels", city=first, min_stars=stars),
        calling("search_hotels", city=second),
        *booked,
        f"All is booked. The sum is {total} euros.",
        *cancellation.demonstration,
    )
    budget_fact = facts(
        budget=("budget limit spend much afford", f"My budget is {budget} euros for everything.")
    )
    return Scenario(
        database,
        UserScript((request, cancellation.says), (*_facts(email), *budget_fact)),
        booked + cancellation.golden,
        (str(total), *cancellation.tell),
        demonstration,
    )


def _cancellation(rng: random.Random, database: Database, traveller: str, home: str) -> Request:
    """Draw a request to cancel an old booking, whose fare may forbid that."""
    booking, fare, price = _old_booking(rng, database, traveller, home)
    destination = database["flights"][booking.split("-")[1]]["destination"]
    says = (
        f"Good. I also have an old booking of a flight to {destination}. Please cancel it and tell"
        " me the refund."
    )
    look = calling("list_bookings", traveller_id=traveller)
    if fare == "flex":
        cancel = calling("cancel_booking", booking_id=booking)
        answer = f"It is cancelled, and you get {price} euros back."
        return Request(says, (cancel,), (str(price),), (look, cancel, answer))
    answer = f"I cannot cancel booking {booking}: its fare is saver."
    return Request(says, (), ("saver", booking), (look, answer))


def _old_booking(
    rng: random.Random, database: Database, traveller: str, home: str
) -> tuple[str, str, int]:
    """Add a booked flight to a city that the trip does not touch, and another traveller's booking.

    Returns:
      (booking id, fare, price) of the first.
    """
    touched = set()
    for flight in database["flights"].values():
        touched |= {flight["origin"], flight["destination"]}
    elsewhere = rng.choice([city for city in CITIES if city not in touched])
    date = draw_date(rng)
    mine, theirs = rng.sample(_add_flights(rng, database, home, elsewhere, date), 2)
    others = [identity for identity in sorted(database["travellers"]) if identity != traveller]
    other = rng.choice(others)
    for owner, identity in ((traveller, mine), (other, theirs)):
        flight = database["flights"][identity]
        database["bookings"][f"{owner}-{identity}"] = {
            "traveller_id": owner,
            "flight_id": identity,
            "price": flight["price"],
            "fare": flight["fare"],
            "status": "booked",
        }
    flight = database["flights"][mine]
    return f"{traveller}-{mine}", flight["fare"], flight["price"]


def _facts(email: str) -> tuple:
    return facts(email=("email mail address identify account", f"My email is {email}."))


def _identify(email: str) -> tuple:
    return "Could you tell me your email?", calling("find_traveller", email=email)


def _look(leg: Leg) -> ToolCall:
    return calling("search_flights", origin=leg.origin, destination=leg.destination, date=leg.date)


def _book_legs(traveller: str, *legs: Leg) -> tuple:
    return tuple(
        calling("book_flight", traveller_id=traveller, flight_id=leg.flight_id) for leg in legs
    )


def _book_hotel(traveller: str, hotel: str, check_in: str, nights: int) -> ToolCall:
    return calling(
        "book_hotel", traveller_id=traveller, hotel_id=hotel, check_in=check_in, nights=nights
    )
