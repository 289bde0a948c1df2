"""Scenarios of the shop world: one to four requests of one customer, each about its own order.

A request is one of seven kinds. In three of them the policy forbids what the user asks for, and the
right answer is to say why and to change nothing. easy: one request that may be granted. medium: two
requests of any kind. hard: three or four, some of them refused.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

from envs.worlds.names import CITIES, day, number, people
from envs.worlds.scenario import Request, Scenario, attempts, calling, joined, prove
from envs.worlds.shop import RETURN_DAYS, TODAY, TOOLS
from envs.worlds.tools import Database
from envs.worlds.user import Fact, facts

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


@dataclasses.dataclass
class Counter:
    """The shop while a scenario is drawn.

    It knows whose orders are drawn, and the products that no order of this customer has yet.
    """

    rng: random.Random
    database: Database
    customer: str
    unused: list[str]

    def new_order(self, status: str, items: int = 1, days_ago: int = 5) -> tuple[str, list[str]]:
        """Add an order of products that no other order of the customer has.

        Returns:
          (order id, SKUs).
        """
        skus = []
        for _ in range(items):
            product = self.database["products"][self.unused.pop()]
            skus.append(self.rng.choice(sorted(product["variants"])))
        order = add_order(self.rng, self.database, self.customer, skus, status, days_ago)
        return order, skus

    def named(self, sku: str) -> str:
        """Return a variant as the customer calls it, such as "the blue medium shirt"."""
        _, product = _product_of(self.database, sku)
        variant = product["variants"][sku]
        return f"the {variant['colour']} {variant['size']} {product['name']}"

    def price(self, order: str) -> int:
        """Return the sum of an order's prices."""
        return sum(item["price"] for item in self.database["orders"][order]["items"].values())

    def methods(self, kind: str) -> list[str]:
        """Return the customer's payment methods of a kind."""
        methods = self.database["customers"][self.customer]["payment_methods"]
        return [identity for identity, method in sorted(methods.items()) if method["kind"] == kind]


def _product_of(database: Database, sku: str) -> tuple[str, dict]:
    """Return the product that has a variant: (product id, product)."""
    for identity, product in database["products"].items():
        if sku in product["variants"]:
            return identity, product
    raise KeyError(sku)


def make_scenario(rng: random.Random, level: str) -> Scenario:
    """Draw a scenario of this level."""
    for draw in attempts(rng):
        counter = _open_shop(draw)
        kinds = _draw_kinds(draw, level)
        draw.shuffle(kinds)
        requests = [kind(counter) for kind in kinds]
        drawn = [request for request in requests if request is not None]
        if len(drawn) == len(kinds):
            return prove(TOOLS, _dialogue(counter, drawn))
    raise AssertionError("attempts() ends with an error")


def _draw_kinds(rng: random.Random, level: str) -> list[Kind]:
    if level == "easy":
        return [rng.choice(GRANTED)]
    if level == "medium":
        return rng.sample(GRANTED + REFUSED, 2)
    return rng.sample(GRANTED, 2) + rng.sample(REFUSED, rng.randint(1, 2))


def _dialogue(counter: Counter, requests: list[Request]) -> Scenario:
    customer = counter.database["customers"][counter.customer]
    name = customer["last_name"]
    code = customer["zip"]
    known = facts(
        name=("name who", f"My last name is {name}."),
        zip=("zip postcode postal", f"My ZIP code is {code}."),
    )
    begin = (
        "Could you tell me your last name and your ZIP code?",
        calling("find_customer", last_name=name, zip=code),
        calling("list_orders", customer_id=counter.customer),
    )
    return joined(counter.database, requests, begin, "Thank you. Another thing:", known)


# -- The shop
# -------------------------------------------------------------------------------------------------


def _draw_methods(rng: random.Random) -> dict[str, dict]:
    """Draw a customer's payment methods: a credit card, PayPal and a gift card."""
    card = number(rng, "M", set())
    paypal = number(rng, "Y", set())
    balance = rng.randrange(150, 300)
    gift_card = number(rng, "G", set())
    return {
        card: {"kind": "credit card", "paid": 0},
        paypal: {"kind": "PayPal", "paid": 0},
        gift_card: {"kind": "gift card", "paid": 0, "balance": balance},
    }


def _open_shop(rng: random.Random) -> Counter:
    """Draw a shop with three customers, one of whom speaks to the agent."""
    database: Database = {"customers": {}, "products": {}, "orders": {}}
    _add_products(rng, database)
    for first, last, _ in people(rng, 3):
        customer = {"first_name": first, "last_name": last}
        methods = _draw_methods(rng)
        customer |= {"zip": f"{rng.randrange(10000, 99999)}", "payment_methods": methods}
        database["customers"][number(rng, "C", database["customers"], 3)] = customer
    speaker = rng.choice(sorted(database["customers"]))
    unused = sorted(database["products"])
    rng.shuffle(unused)
    for other in sorted(database["customers"]):
        if other == speaker:
            continue
        for status in ("pending", "delivered"):
            skus = []
            for product in rng.sample(sorted(database["products"]), 2):
                skus.append(rng.choice(sorted(database["products"][product]["variants"])))
            add_order(rng, database, other, skus, status, rng.randrange(1, 60))
    counter = Counter(rng, database, speaker, unused)
    counter.new_order("delivered", days_ago=rng.randrange(3, 60))  # no request is about it
    return counter


def _add_products(rng: random.Random, database: Database) -> None:
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
        identity = number(rng, "P", database["products"], 3)
        database["products"][identity] = {"name": name, "variants": variants}


def add_order(
    rng: random.Random,
    database: Database,
    customer: str,
    skus: list[str],
    status: str,
    days_ago: int,
) -> str:
    """Add an order that is paid by card or PayPal and got its status `days_ago` days ago."""
    identity = number(rng, "W", database["orders"])
    methods = database["customers"][customer]["payment_methods"]
    method = rng.choice([one for one in sorted(methods) if methods[one]["kind"] != "gift card"])
    items = {}
    contents = {}
    for sku in skus:
        _, product = _product_of(database, sku)
        variant = product["variants"][sku]
        items[sku] = {"price": variant["price"], "status": "bought"}
        contents[sku] = f"{variant['colour']} {variant['size']} {product['name']}"
    database["orders"][identity] = {
        "customer_id": customer,
        "status": status,
        "status_since": day(TODAY, -days_ago),
        "payment_method": method,
        "address": f"Main Street {rng.randrange(1, 99)}, {rng.choice(CITIES)}",
        "items": items,
        "contents": contents,
    }
    methods[method]["paid"] += sum(item["price"] for item in items.values())
    return identity


# -- Kinds of requests
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
    to_gift_card = counter.rng.random() < 0.5
    bought = counter.database["orders"][order]
    if to_gift_card:
        method = counter.methods("gift card")[0]
        where = ", with the refund on my gift card"
    else:
        method = bought["payment_method"]
        where = ""
    refund = str(sum(bought["items"][sku]["price"] for sku in chosen))
    named = " and ".join(map(counter.named, chosen))
    call = calling("return_items", order_id=order, skus=chosen, refund_to=method)
    return Request(
        f"I want to return {named}{where}.",
        (call,),
        (refund,),
        (
            f"I would take the items back and refund {refund} euros to {method}. Do you agree?",
            call,
            f"Done: {refund} euros are refunded.",
        ),
    )


def _exchange(counter: Counter) -> Request | None:
    """Draw an exchange for the cheapest variant of a wanted size that is in stock.

    The user names the payment method when asked for it.
    """
    order, (sku,) = counter.new_order("delivered", 1, counter.rng.randrange(1, RETURN_DAYS))
    product_id, product = _product_of(counter.database, sku)
    variants = product["variants"]
    size = counter.rng.choice([one for one in SIZES if one != variants[sku]["size"]])
    fit = sorted(
        (variant["price"], one)
        for one, variant in variants.items()
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
    house = counter.rng.randrange(1, 99)
    city = counter.rng.choice(CITIES)
    street = f"{road} Road {house}, {code} {city}"
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


Kind = Callable[[Counter], Request | None]
GRANTED: list[Kind] = [_cancel, _return, _exchange, _address]
REFUSED: list[Kind] = [_late, _shipped, _cancelled]
