"""The system of the travel world: flights, hotels, travellers with a balance, bookings.

Money is in whole euros.
"""

from __future__ import annotations

import datetime
import random

from envs.gem import ToolCall
from envs.worlds.scenario import calling
from envs.worlds.tools import Database, Tool, ToolRefusal, find, text, whole

POLICY = """\
You are the agent of a travel desk. Policy:
1. Look the traveller up by email before anything else; ask for it.
2. Book exactly what the user asks for, for this traveller only, and nothing else. Prices are \
in euros.
3. Where a budget is given, the sum of all flights and hotels of the request must not exceed it. \
Ask for the budget if the user speaks of one without naming it.
4. "Cheapest", "earliest" and "best rated" are meant among the options that fulfil the user's \
other conditions.
5. Once everything of a request is booked, tell the user the sum of its prices.
6. A flight of the fare "flex" can be cancelled and is refunded in full. One of the fare "saver" \
is never cancelled:
   tell the user that the fare is saver, and the id of the booking."""


def find_traveller(database: Database, email: str) -> dict:
    """Find a traveller by email."""
    for identity, traveller in database["travellers"].items():
        if traveller["email"] == email.strip().lower():
            return {"traveller_id": identity, **traveller}
    raise ToolRefusal(f"nobody has the email {email[:60]!r}")


def search_flights(database: Database, origin: str, destination: str, date: str) -> list[dict]:
    """List the flights from one city to another on a day."""
    wanted = (origin.lower(), destination.lower(), date)
    found = []
    for identity, flight in database["flights"].items():
        if (flight["origin"].lower(), flight["destination"].lower(), flight["date"]) == wanted:
            found.append({"flight_id": identity, **flight})
    return found


def search_hotels(database: Database, city: str, min_stars: int = 1) -> list[dict]:
    """List the hotels of a city."""
    return [
        {"hotel_id": identity, **hotel}
        for identity, hotel in database["hotels"].items()
        if hotel["city"].lower() == city.lower() and hotel["stars"] >= min_stars
    ]


def list_bookings(database: Database, traveller_id: str) -> list[dict]:
    """List the bookings of a traveller."""
    find(database["travellers"], traveller_id, "traveller")
    return [
        {"booking_id": identity, **booking}
        for identity, booking in database["bookings"].items()
        if booking["traveller_id"] == traveller_id
    ]


def book_flight(database: Database, traveller_id: str, flight_id: str) -> dict:
    """Book a seat and pay it from the traveller's balance."""
    traveller = find(database["travellers"], traveller_id, "traveller")
    flight = find(database["flights"], flight_id, "flight")
    if flight["seats"] < 1:
        raise ToolRefusal(f"flight {flight_id} is full")
    booking = {
        "traveller_id": traveller_id,
        "flight_id": flight_id,
        "price": flight["price"],
        "fare": flight["fare"],
        "status": "booked",
    }
    answer = _book(database, traveller, f"{traveller_id}-{flight_id}", booking)
    flight["seats"] -= 1
    return answer


def book_hotel(
    database: Database, traveller_id: str, hotel_id: str, check_in: str, nights: int
) -> dict:
    """Book a room and pay it from the traveller's balance."""
    traveller = find(database["travellers"], traveller_id, "traveller")
    hotel = find(database["hotels"], hotel_id, "hotel")
    try:
        check_in = datetime.date.fromisoformat(check_in).isoformat()
    except ValueError:
        raise ToolRefusal(f"check_in {check_in[:40]!r} is no date of the form YYYY-MM-DD") from None
    booking = {
        "traveller_id": traveller_id,
        "hotel_id": hotel_id,
        "check_in": check_in,
        "nights": nights,
        "price": hotel["price_per_night"] * nights,
        "status": "booked",
    }
    return _book(database, traveller, f"{traveller_id}-{hotel_id}-{check_in}", booking)


def _book(database: Database, traveller: dict, identity: str, booking: dict) -> dict:
    """Enter a booking under an id made from its content.

    So the order of bookings does not matter to the state.
    """
    if database["bookings"].get(identity, {}).get("status") == "booked":
        raise ToolRefusal(f"{identity} is booked already")
    if traveller["balance"] < booking["price"]:
        raise ToolRefusal(
            f"the price is {booking['price']}, and the balance only {traveller['balance']}"
        )
    traveller["balance"] -= booking["price"]
    database["bookings"][identity] = booking
    return {"booking_id": identity, "price": booking["price"], "balance": traveller["balance"]}


def cancel_booking(database: Database, booking_id: str) -> dict:
    """Cancel a booking; hotels and saver fares are not refunded.

    The system allows to cancel these, the policy forbids it.
    """
    booking = find(database["bookings"], booking_id, "booking")
    if booking["status"] != "booked":
        raise ToolRefusal(f"booking {booking_id} is {booking['status']} already")
    refund = booking["price"] if booking.get("fare") == "flex" else 0
    booking["status"] = "cancelled"
    traveller = database["travellers"][booking["traveller_id"]]
    traveller["balance"] += refund
    flight = database["flights"].get(booking.get("flight_id"))
    if flight is not None:
        flight["seats"] += 1
    return {"booking_id": booking_id, "refund": refund}


_TRAVELLER = text("Id of the traveller, such as T123.")
_DATE = "Date as YYYY-MM-DD."
TOOLS = (
    Tool(
        "find_traveller",
        "Looks a traveller up by email.",
        {"email": text("Email address.")},
        find_traveller,
    ),
    Tool(
        "search_flights",
        "All flights from one city to another on a day.",
        {"origin": text("City."), "destination": text("City."), "date": text(_DATE)},
        search_flights,
    ),
    Tool(
        "search_hotels",
        "All hotels of a city.",
        {"city": text("City."), "min_stars": whole("Fewest stars.", minimum=1, maximum=5)},
        search_hotels,
        optional=("min_stars",),
    ),
    Tool(
        "list_bookings", "All bookings of a traveller.", {"traveller_id": _TRAVELLER}, list_bookings
    ),
    Tool(
        "book_flight",
        "Books one seat and pays it from the traveller's balance.",
        {"traveller_id": _TRAVELLER, "flight_id": text("Id of the flight.")},
        book_flight,
        writes=True,
    ),
    Tool(
        "book_hotel",
        "Books a room and pays it from the traveller's balance.",
        {
            "traveller_id": _TRAVELLER,
            "hotel_id": text("Id of the hotel."),
            "check_in": text(_DATE),
            "nights": whole("Nights.", minimum=1, maximum=30),
        },
        book_hotel,
        writes=True,
    ),
    Tool(
        "cancel_booking",
        "Cancels a booking. This cannot be undone.",
        {"booking_id": text("Id of the booking.")},
        cancel_booking,
        writes=True,
    ),
)


def random_write(rng: random.Random, database: Database) -> ToolCall:
    """Draw a booking or a cancellation with ids that exist."""
    traveller = rng.choice(sorted(database["travellers"]))
    kinds = ["flight", "hotel"]
    if database["bookings"]:
        kinds.append("cancel")
    kind = rng.choice(kinds)
    if kind == "cancel":
        return calling("cancel_booking", booking_id=rng.choice(sorted(database["bookings"])))
    if kind == "flight":
        flight = rng.choice(sorted(database["flights"]))
        return calling("book_flight", traveller_id=traveller, flight_id=flight)
    date = rng.choice(sorted(flight["date"] for flight in database["flights"].values()))
    return calling(
        "book_hotel",
        traveller_id=traveller,
        hotel_id=rng.choice(sorted(database["hotels"])),
        check_in=date,
        nights=rng.randint(1, 5),
    )
