"""Names that the worlds draw from, and small random draws that several of them need."""

from __future__ import annotations

import datetime
import random

_FIRST_NAMES = """
Ada Bruno Chidi Dora Emil Farah Goran Hana Ines Jonas Kira Luca Mina Nils Olga Pavel Rosa Sven Tara
Yusuf
"""
_LAST_NAMES = """
Abel Brandt Costa Duarte Evans Fischer Gruber Haddad Ivanov Jansen Kovac Lindt Moreau Novak Okafor
Petrov Quist Rossi
"""
_CITY_NAMES = """
Athens Bergen Cairo Dublin Essen Florence Geneva Helsinki Izmir Krakow Lisbon Madrid Naples Oslo
Porto Riga
"""
FIRST = tuple(_FIRST_NAMES.split())
LAST = tuple(_LAST_NAMES.split())
CITIES = tuple(_CITY_NAMES.split())


def people(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    """Draw different people as (first name, last name, email)."""
    pairs = rng.sample([(first, last) for first in FIRST for last in LAST], count)
    return [(first, last, f"{first.lower()}.{last.lower()}@mail.example") for first, last in pairs]


def number(rng: random.Random, prefix: str, taken: dict | set, digits: int = 4) -> str:
    """Draw an id that is not taken yet, such as W4821."""
    while (one := f"{prefix}{rng.randrange(10 ** (digits - 1), 10**digits)}") in taken:
        pass
    return one


def clock(minutes: int) -> str:
    """Write minutes after midnight as 09:05; they wrap at midnight."""
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"


def day(date: str, later: int) -> str:
    """Return the date so many days later; both dates are YYYY-MM-DD."""
    return (datetime.date.fromisoformat(date) + datetime.timedelta(days=later)).isoformat()


def draw_date(rng: random.Random) -> str:
    """Draw a date as YYYY-MM-DD."""
    return day("2031-03-01", rng.randrange(200))
