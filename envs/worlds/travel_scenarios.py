"""Scenarios of the travel world: a trip with conditions that exactly one choice of flights and
hotels fulfils.

easy: one flight. medium: there and back with a hotel, within a budget. hard: two cities, the budget
told only when asked for, then an old booking that may or may not be cancelled.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from envs.worlds.base import Scenario, attempts, calling, prove, turns
from envs.worlds.names import CITIES, clock, day, draw_date, number, people
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
    """One flight that is wanted, how the user says it, and the only id that fulfils it."""

    origin: str
    destination: str
    date: str
    wish: str
    flight_id: str
    price: int


def make_scenario(rng: random.Random, level: str) -> Scenario:
    for draw in attempts(rng):
        scenario = {"easy": _easy, "medium": _medium, "hard": _hard}[level](draw)
        if scenario is not None:
            return prove(TOOLS, scenario)


def _new_database(rng: random.Random) -> tuple[Database, str]:
    """A database without flights and hotels, and the id of the traveller who asks."""
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
    """Adds flights of a day and draws a wish; None where no flight fulfils it or two do equally
    well.
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
                lambda one: one["price"],
            ),
            (
                f"the flight that arrives earliest among those of at most {cap} euros",
                lambda one: one["price"] <= cap,
                lambda one: one["arrives"],
            ),
            (
                "the cheapest flight with the fare flex that arrives before 19:00",
                lambda one: one["fare"] == "flex" and one["arrives"] < "19:00",
                lambda one: one["price"],
            ),
            (
                f"the latest departure among flights of at most {cap} euros",
                lambda one: one["price"] <= cap,
                lambda one: tuple(-ord(letter) for letter in one["departs"]),
            ),
        ]
    )
    chosen = _only_best(flights, lambda one: condition(one) and one["seats"] > 0, order)
    return (
        Leg(
            origin,
            destination,
            date,
            f"{wish} (it must have a free seat)",
            chosen,
            flights[chosen]["price"],
        )
        if chosen
        else None
    )


def _only_best(
    table: dict[str, dict], condition: Callable[[dict], bool], order: Callable
) -> str | None:
    """The entry that comes first among those that fulfil the condition; None where there is none,
    or no single one.
    """
    fit = sorted((order(entry), identity) for identity, entry in table.items() if condition(entry))
    return fit[0][1] if fit and (len(fit) == 1 or fit[0][0] != fit[1][0]) else None


def _add_hotels(rng: random.Random, database: Database, city: str) -> dict[str, dict]:
    added = {}
    for name, rating in zip(rng.sample(HOTELS, 6), rng.sample(range(60, 99), 6), strict=True):
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
    """(hotel, budget) so that this hotel is the best rated one with these stars that keeps the
    whole within the budget; None where the draw fails.
    """
    fit = {identity: hotel for identity, hotel in hotels.items() if hotel["stars"] >= stars}
    if len(fit) < 2:
        return None
    chosen = rng.choice(sorted(fit))
    price = fit[chosen]["price_per_night"] * nights
    room = min(
        [
            hotel["price_per_night"] * nights - price
            for hotel in fit.values()
            if hotel["rating"] > fit[chosen]["rating"]
        ],
        default=40,
    )
    return (chosen, rest + price + rng.randrange(min(room, 40))) if room > 0 else None


# -- the levels
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
    found = _within_budget(
        rng, _add_hotels(rng, database, city), stars, nights, out.price + back.price
    )
    if found is None:
        return None
    hotel, budget = found
    total = out.price + back.price + database["hotels"][hotel]["price_per_night"] * nights
    email = database["travellers"][traveller]["email"]
    request = (
        f"Hi, please plan my trip from {home} to {city}. I fly there on {date}: {out.wish}. I fly"
        f" back on {back.date}: {back.wish}. For the {nights} nights I want the best rated hotel"
        f" with at least {stars} stars that keeps the whole trip within my budget of {budget}"
        " euros."
    )
    golden = (
        *_book_legs(traveller, out, back),
        calling("book_hotel", traveller_id=traveller, hotel_id=hotel, check_in=date, nights=nights),
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
    stays = (rng.randint(2, 3), rng.randint(2, 3))
    stars = rng.randint(2, 4)
    legs = [
        _draw_leg(rng, database, *way)
        for way in (
            (home, first, date),
            (first, second, day(date, stays[0])),
            (second, home, day(date, sum(stays))),
        )
    ]
    if None in legs:
        return None
    inn = _only_best(
        _add_hotels(rng, database, second),
        lambda one: one["breakfast"] and one["stars"] >= 3,
        lambda one: one["price_per_night"],
    )
    if inn is None:
        return None
    fixed = sum(leg.price for leg in legs) + database["hotels"][inn]["price_per_night"] * stays[1]
    found = _within_budget(rng, _add_hotels(rng, database, first), stars, stays[0], fixed)
    if found is None or found[1] > 4500:
        return None
    hotel, budget = found
    total = fixed + database["hotels"][hotel]["price_per_night"] * stays[0]
    email = database["travellers"][traveller]["email"]
    old, fare, price = _old_booking(rng, database, traveller, home)
    request = (
        f"Good morning. I travel from {home} to {first} on {date}, on to {second} on {legs[1].date}"
        f" and home on {legs[2].date}. Flights: first {legs[0].wish}; then {legs[1].wish}; last"
        f" {legs[2].wish}. In {second} I want the cheapest hotel with breakfast and at least 3"
        f" stars, in {first} the best rated hotel with at least {stars} stars that keeps the whole"
        " trip within my budget."
    )
    then = (
        "Good. I also have an old booking of a flight to"
        f" {database['flights'][old.split('-')[1]]['destination']}. Please cancel it and tell me"
        " the refund."
    )
    booked = (
        *_book_legs(traveller, *legs),
        calling(
            "book_hotel", traveller_id=traveller, hotel_id=hotel, check_in=date, nights=stays[0]
        ),
        calling(
            "book_hotel",
            traveller_id=traveller,
            hotel_id=inn,
            check_in=legs[1].date,
            nights=stays[1],
        ),
    )
    cancel = (calling("cancel_booking", booking_id=old),) if fare == "flex" else ()
    answer = (
        f"It is cancelled, and you get {price} euros back."
        if fare == "flex"
        else f"I cannot cancel booking {old}: its fare is saver."
    )
    demonstration = turns(
        "Could you tell me your email and your budget?",
        calling("find_traveller", email=email),
        *map(_look, legs),
        calling("search_hotels", city=first, min_stars=stars),
        calling("search_hotels", city=second),
        *booked,
        f"All is booked. The sum is {total} euros.",
        calling("list_bookings", traveller_id=traveller),
        *cancel,
        answer,
    )
    known = (
        *_facts(email),
        *facts(
            budget=(
                "budget limit spend much afford",
                f"My budget is {budget} euros for everything.",
            )
        ),
    )
    return Scenario(
        database,
        UserScript((request, then), known),
        booked + cancel,
        (str(total), *((str(price),) if cancel else ("saver", old))),
        demonstration,
    )


def _old_booking(
    rng: random.Random, database: Database, traveller: str, home: str
) -> tuple[str, str, int]:
    """Adds a booked flight to a city that the trip does not touch, and a booking of somebody else;
    (booking id, fare, price).
    """
    touched = {
        flight[end] for flight in database["flights"].values() for end in ("origin", "destination")
    }
    elsewhere = rng.choice([city for city in CITIES if city not in touched])
    date = draw_date(rng)
    mine, theirs = rng.sample(_add_flights(rng, database, home, elsewhere, date), 2)
    other = rng.choice(
        [identity for identity in sorted(database["travellers"]) if identity != traveller]
    )
    for owner, identity in ((traveller, mine), (other, theirs)):
        flight = database["flights"][identity]
        database["bookings"][f"{owner}-{identity}"] = {
            "traveller_id": owner,
            "flight_id": identity,
            "price": flight["price"],
            "fare": flight["fare"],
            "status": "booked",
        }
    return (
        f"{traveller}-{mine}",
        database["flights"][mine]["fare"],
        database["flights"][mine]["price"],
    )


def _facts(email: str) -> tuple:
    return facts(email=("email mail address identify account", f"My email is {email}."))


def _identify(email: str) -> tuple:
    return "Could you tell me your email?", calling("find_traveller", email=email)


def _look(leg: Leg):
    return calling("search_flights", origin=leg.origin, destination=leg.destination, date=leg.date)


def _book_legs(traveller: str, *legs: Leg) -> tuple:
    return tuple(
        calling("book_flight", traveller_id=traveller, flight_id=leg.flight_id) for leg in legs
    )
