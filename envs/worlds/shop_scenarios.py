"""Scenarios of the shop world: one to four requests of one customer, each about an order of its
own.

A request is drawn from seven kinds; in three of them the policy forbids what the user asks for, and
the right answer is to say why and change nothing. easy: one request that may be granted. medium:
two. hard: three or four, some of them refused.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from envs.gem import ToolCall
from envs.worlds.base import Scenario, attempts, calling, prove, turns
from envs.worlds.names import CITIES, day, number, people
from envs.worlds.shop import RETURN_DAYS, TODAY, TOOLS
from envs.worlds.tools import Database
from envs.worlds.user import Fact, UserScript, facts

PRODUCTS = (
    "shirt",
    "jacket",
    "backpack",
    "lamp",
    "kettle",
    "blanket",
    "cap",
    "bottle",
    "scarf",
    "tent",
    "mug",
    "towel",
)
COLOURS = ("black", "blue", "green", "grey", "red", "white")
SIZES = ("small", "medium", "large")


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing that the user wants, and how it is done right."""

    says: str
    golden: tuple[ToolCall, ...]
    tell: tuple[str, ...]
    demonstration: tuple[ToolCall | str, ...]
    facts: tuple[Fact, ...] = ()


@dataclasses.dataclass
class Counter:
    """The shop while a scenario is drawn: whose order it is, and products that no order of theirs
    has yet.
    """

    rng: random.Random
    database: Database
    customer: str
    unused: list[str]

    def new_order(self, status: str, items: int = 1, days_ago: int = 5) -> tuple[str, list[str]]:
        """(order id, skus) of a new order of products that the customer has no other order of."""
        variants = [
            self.rng.choice(sorted(self.database["products"][self.unused.pop()]["variants"]))
            for _ in range(items)
        ]
        return (
            add_order(self.rng, self.database, self.customer, variants, status, days_ago),
            variants,
        )

    def named(self, sku: str) -> str:
        """As the customer calls it: the blue medium shirt."""
        product = next(
            product for product in self.database["products"].values() if sku in product["variants"]
        )
        variant = product["variants"][sku]
        return f"the {variant['colour']} {variant['size']} {product['name']}"

    def price(self, order: str) -> int:
        return sum(item["price"] for item in self.database["orders"][order]["items"].values())

    def methods(self, kind: str) -> list[str]:
        return [
            identity
            for identity, method in sorted(
                self.database["customers"][self.customer]["payment_methods"].items()
            )
            if method["kind"] == kind
        ]


def make_scenario(rng: random.Random, level: str) -> Scenario:
    for draw in attempts(rng):
        counter = _open_shop(draw)
        kinds = {
            "easy": lambda: [draw.choice(GRANTED)],
            "medium": lambda: draw.sample(GRANTED + REFUSED, 2),
            "hard": lambda: draw.sample(GRANTED, 2) + draw.sample(REFUSED, draw.randint(1, 2)),
        }[level]()
        draw.shuffle(kinds)
        requests = [kind(counter) for kind in kinds]
        if None not in requests:
            return prove(TOOLS, _joined(counter, requests))


def _joined(counter: Counter, requests: list[Request]) -> Scenario:
    customer = counter.database["customers"][counter.customer]
    name = customer["last_name"]
    code = customer["zip"]
    says = [
        f"Hello. {requests[0].says}",
        *(f"Thank you. Another thing: {request.says}" for request in requests[1:]),
    ]
    known = facts(
        name=("name who", f"My last name is {name}."),
        zip=("zip postcode postal", f"My ZIP code is {code}."),
    ) + tuple(fact for request in requests for fact in request.facts)
    begin = (
        "Could you tell me your last name and your ZIP code?",
        calling("find_customer", last_name=name, zip=code),
        calling("list_orders", customer_id=counter.customer),
    )
    return Scenario(
        counter.database,
        UserScript(tuple(says), known),
        tuple(call for request in requests for call in request.golden),
        tuple(fact for request in requests for fact in request.tell),
        turns(*begin, *(step for request in requests for step in request.demonstration)),
    )


# -- the shop
# -------------------------------------------------------------------------------------------------


def _open_shop(rng: random.Random) -> Counter:
    database: Database = {"customers": {}, "products": {}, "orders": {}}
    taken: set[str] = set()
    for name in rng.sample(PRODUCTS, 9):
        variants = {}
        for colour in rng.sample(COLOURS, 3):
            for size in SIZES:
                sku = number(rng, "S", taken, 5)
                taken.add(sku)
                variants[sku] = {
                    "colour": colour,
                    "size": size,
                    "price": rng.randrange(15, 120),
                    "stock": rng.choice([0, 1, 3, 8]),
                }
        database["products"][number(rng, "P", database["products"], 3)] = {
            "name": name,
            "variants": variants,
        }
    for first, last, _ in people(rng, 3):
        methods = {
            number(rng, kind, set()): {"kind": name, "paid": 0}
            for kind, name in (("M", "credit card"), ("Y", "PayPal"))
        }
        methods[number(rng, "G", set())] = {
            "kind": "gift card",
            "paid": 0,
            "balance": rng.randrange(150, 300),
        }
        database["customers"][number(rng, "C", database["customers"], 3)] = {
            "first_name": first,
            "last_name": last,
            "zip": f"{rng.randrange(10000, 99999)}",
            "payment_methods": methods,
        }
    customer = rng.choice(sorted(database["customers"]))
    unused = sorted(database["products"])
    rng.shuffle(unused)
    for other in sorted(database["customers"]):
        for status in ("pending", "delivered") if other != customer else ():
            variants = [
                rng.choice(sorted(product["variants"]))
                for product in rng.sample(
                    [database["products"][one] for one in sorted(database["products"])], 2
                )
            ]
            add_order(rng, database, other, variants, status, rng.randrange(1, 60))
    counter = Counter(rng, database, customer, unused)
    counter.new_order("delivered", days_ago=rng.randrange(3, 60))  # which nobody speaks of
    return counter


def add_order(
    rng: random.Random,
    database: Database,
    customer: str,
    skus: list[str],
    status: str,
    days_ago: int,
) -> str:
    """Adds an order paid by card or PayPal; `days_ago` is since when it has its status."""
    identity = number(rng, "W", database["orders"])
    methods = database["customers"][customer]["payment_methods"]
    method = rng.choice([one for one in sorted(methods) if methods[one]["kind"] != "gift card"])
    variants = {
        sku: variant
        for product in database["products"].values()
        for sku, variant in product["variants"].items()
    }
    names = {
        sku: product["name"]
        for product in database["products"].values()
        for sku in product["variants"]
    }
    items = {sku: {"price": variants[sku]["price"], "status": "bought"} for sku in skus}
    database["orders"][identity] = {
        "customer_id": customer,
        "status": status,
        "status_since": day(TODAY, -days_ago),
        "payment_method": method,
        "address": f"Main Street {rng.randrange(1, 99)}, {rng.choice(CITIES)}",
        "items": items,
        "contents": {
            sku: f"{variants[sku]['colour']} {variants[sku]['size']} {names[sku]}" for sku in skus
        },
    }
    methods[method]["paid"] += sum(item["price"] for item in items.values())
    return identity


# -- kinds of requests
# -------------------------------------------------------------------------------------------------


def _cancel(counter: Counter) -> Request:
    order, skus = counter.new_order("pending", counter.rng.randint(1, 2))
    refund = str(counter.price(order))
    call = calling("cancel_order", order_id=order)
    return Request(
        f"Please cancel my order of {' and '.join(map(counter.named, skus))}.",
        (call,),
        (refund,),
        (
            f"I would cancel order {order}. Shall I go ahead?",
            call,
            f"It is cancelled, and {refund} euros are refunded.",
        ),
    )


def _return(counter: Counter) -> Request:
    order, skus = counter.new_order("delivered", 2, counter.rng.randrange(1, RETURN_DAYS))
    chosen = skus[: counter.rng.randint(1, 2)]
    to_card = counter.rng.random() < 0.5
    method = (
        counter.methods("gift card")[0]
        if to_card
        else counter.database["orders"][order]["payment_method"]
    )
    refund = str(sum(counter.database["orders"][order]["items"][sku]["price"] for sku in chosen))
    call = calling("return_items", order_id=order, skus=chosen, refund_to=method)
    return Request(
        "I want to return"
        f" {' and '.join(map(counter.named, chosen))}{', with the refund on my gift card' if to_card else ''}.",
        (call,),
        (refund,),
        (
            f"I would take the items back and refund {refund} euros to {method}. Do you agree?",
            call,
            f"Done: {refund} euros are refunded.",
        ),
    )


def _exchange(counter: Counter) -> Request | None:
    """For the cheapest variant of a wanted size that is in stock; paid by a method that is told
    when asked for.
    """
    order, (sku,) = counter.new_order("delivered", 1, counter.rng.randrange(1, RETURN_DAYS))
    product_id, product = next(
        (one, product)
        for one, product in counter.database["products"].items()
        if sku in product["variants"]
    )
    size = counter.rng.choice([one for one in SIZES if one != product["variants"][sku]["size"]])
    fit = sorted(
        (variant["price"], one)
        for one, variant in product["variants"].items()
        if variant["size"] == size and variant["stock"] > 0
    )
    if not fit or (len(fit) > 1 and fit[0][0] == fit[1][0]):
        return None
    price, new = fit[0]
    kind = counter.rng.choice(["credit card", "PayPal", "gift card"])
    method = counter.methods(kind)[0]
    call = calling("exchange_item", order_id=order, sku=sku, new_sku=new, payment_method=method)
    paying = Fact(
        ("payment", "pay", "method", "difference"),
        f"The difference of the exchange goes to my {kind}.",
    )
    return Request(
        f"I want to exchange {counter.named(sku)} for a {size} one, the cheapest that is in stock,"
        " of whatever colour.",
        (call,),
        (str(price),),
        (
            calling("list_products"),
            calling("get_product", product_id=product_id),
            "Which payment method shall the difference go to?",
            f"I would exchange {sku} for {new}. Do you agree?",
            call,
            f"It is exchanged; the new one costs {price} euros.",
        ),
        (paying,),
    )


def _address(counter: Counter) -> Request:
    order, skus = counter.new_order("pending")
    road = counter.rng.choice(["Lake", "Hill", "Garden", "Station"])
    code = counter.rng.randrange(10000, 99999)
    street = f"{road} Road {counter.rng.randrange(1, 99)}, {code} {counter.rng.choice(CITIES)}"
    call = calling("change_address", order_id=order, address=street)
    known = Fact(
        ("address", "street", "deliver", "delivered", "where"), f"The new address is: {street}"
    )
    return Request(
        f"My order of {counter.named(skus[0])} must go to another address.",
        (call,),
        (),
        (
            "What is the new address?",
            f"I would send order {order} there. Shall I go ahead?",
            call,
            "The order goes to the new address.",
        ),
        (known,),
    )


def _late(counter: Counter) -> Request:
    ago = counter.rng.randrange(RETURN_DAYS + 1, RETURN_DAYS + 150)
    order, skus = counter.new_order("delivered", 1, ago)
    last = day(counter.database["orders"][order]["status_since"], RETURN_DAYS)
    return Request(
        f"I want to return {counter.named(skus[0])}.",
        (),
        (last,),
        (f"I am sorry, a return was possible until {last} only.",),
    )


def _shipped(counter: Counter) -> Request:
    order, skus = counter.new_order(
        "shipped", counter.rng.randint(1, 2), counter.rng.randrange(1, 90)
    )
    since = counter.database["orders"][order]["status_since"]
    return Request(
        f"Please cancel my order of {' and '.join(map(counter.named, skus))}.",
        (),
        ("shipped", since),
        (f"I cannot cancel that order any more: its status is shipped since {since}.",),
    )


def _cancelled(counter: Counter) -> Request:
    order, skus = counter.new_order("cancelled", 1, counter.rng.randrange(1, 90))
    since = counter.database["orders"][order]["status_since"]
    return Request(
        f"My order of {counter.named(skus[0])} must go to another address.",
        (),
        ("cancelled", since),
        (f"The address cannot be changed: the status of that order is cancelled since {since}.",),
    )


GRANTED: list[Callable[[Counter], Request | None]] = [_cancel, _return, _exchange, _address]
REFUSED: list[Callable[[Counter], Request | None]] = [_late, _shipped, _cancelled]
