"""The system of the shop world: customers, payment methods, products and orders.

Money is in whole euros. `paid` of a payment method is the shop's net income from it: charges add,
refunds subtract. A gift card also has a balance, which cannot fall below 0.
"""

from __future__ import annotations

import random

from envs.gem import ToolCall
from envs.worlds.scenario import calling
from envs.worlds.tools import Database, Tool, ToolRefusal, find, text, texts

TODAY = "2031-06-30"
RETURN_DAYS = 30
POLICY = f"""\
You are the agent of an online shop. Today is {TODAY}. Policy:
1. Find the customer by last name and ZIP code before anything else; ask for both. Act on this \
customer's orders only.
2. Say what you are about to change and get the user's consent before you change it. Change \
nothing that was not asked for.
3. An order can be cancelled, or get another address, only while it is pending. If it is not, \
tell the user its status and since which day it has it, as YYYY-MM-DD.
4. Items of a delivered order can be returned or exchanged until {RETURN_DAYS} days after the \
delivery, that day included.
   If it is later, do not do it: tell the user the last day on which it was possible, as YYYY-MM-DD.
5. A return is refunded to the payment method of the order, unless the user asks for another of \
the customer's methods. Tell the user the sum refunded.
6. An exchange is for another variant of the same product that is in stock. Ask which payment \
method the difference goes to, and tell the user the new variant's price.
7. When an order is cancelled, tell the user the sum refunded."""


def find_customer(database: Database, last_name: str, zip: str) -> dict:
    """Find a customer by last name and ZIP code."""
    for identity, customer in database["customers"].items():
        if customer["last_name"].lower() != last_name.strip().lower():
            continue
        if customer["zip"] == zip.strip():
            return {"customer_id": identity, **customer}
    raise ToolRefusal(
        f"no customer has the last name {last_name[:40]!r} and the ZIP code {zip[:20]!r}"
    )


def list_orders(database: Database, customer_id: str) -> list[dict]:
    """List the orders of a customer."""
    find(database["customers"], customer_id, "customer")
    return [
        {"order_id": identity, **order}
        for identity, order in database["orders"].items()
        if order["customer_id"] == customer_id
    ]


def list_products(database: Database) -> dict[str, str]:
    """Return the names of all products by id."""
    return {identity: product["name"] for identity, product in database["products"].items()}


def get_product(database: Database, product_id: str) -> dict:
    """Return a product with its variants."""
    return find(database["products"], product_id, "product")


def cancel_order(database: Database, order_id: str) -> dict:
    """Cancel a pending order and refund it."""
    order = _with_status(database, order_id, "pending")
    refund = sum(item["price"] for item in order["items"].values())
    order.update(status="cancelled", status_since=TODAY)
    for sku in order["items"]:
        _variant(database, sku)["stock"] += 1
    _pay(database, order["customer_id"], order["payment_method"], -refund)
    return {"order_id": order_id, "status": "cancelled", "refund": refund}


def change_address(database: Database, order_id: str, address: str) -> dict:
    """Change the address of a pending order."""
    order = _with_status(database, order_id, "pending")
    order["address"] = " ".join(address.split())
    return {"order_id": order_id, "address": order["address"]}


def return_items(database: Database, order_id: str, skus: list[str], refund_to: str) -> dict:
    """Take items of a delivered order back and refund them.

    The system checks no date; that is up to the policy.
    """
    order = _with_status(database, order_id, "delivered")
    if not skus or len(set(skus)) < len(skus):
        raise ToolRefusal("skus must name one item or more, each once")
    items = [_bought(order, order_id, sku) for sku in skus]
    refund = sum(item["price"] for item in items)
    _pay(database, order["customer_id"], refund_to, -refund)
    for item in items:
        item["status"] = "returned"
    return {"order_id": order_id, "returned": skus, "refund": refund, "refund_to": refund_to}


def exchange_item(
    database: Database, order_id: str, sku: str, new_sku: str, payment_method: str
) -> dict:
    """Exchange an item of a delivered order for another variant."""
    order = _with_status(database, order_id, "delivered")
    item = _bought(order, order_id, sku)
    new = _variant(database, new_sku)
    if new_sku not in _product_of(database, sku)["variants"] or new_sku in order["items"]:
        raise ToolRefusal(f"{new_sku} is no other variant of the product of {sku}")
    if new["stock"] < 1:
        raise ToolRefusal(f"{new_sku} is out of stock")
    _pay(database, order["customer_id"], payment_method, new["price"] - item["price"])
    item["status"] = "exchanged"
    new["stock"] = new["stock"] - 1
    order["items"][new_sku] = {"price": new["price"], "status": "bought"}
    return {
        "order_id": order_id,
        "new_sku": new_sku,
        "price": new["price"],
        "difference": new["price"] - item["price"],
        "payment_method": payment_method,
    }


def _with_status(database: Database, order_id: str, status: str) -> dict:
    order = find(database["orders"], order_id, "order")
    if order["status"] != status:
        raise ToolRefusal(f"order {order_id} is {order['status']}, not {status}")
    return order


def _bought(order: dict, order_id: str, sku: str) -> dict:
    item = find(order["items"], sku, f"in order {order_id}, the item")
    if item["status"] != "bought":
        raise ToolRefusal(f"item {sku} of order {order_id} was {item['status']} already")
    return item


def _product_of(database: Database, sku: str) -> dict:
    for product in database["products"].values():
        if sku in product["variants"]:
            return product
    return {"variants": {}}


def _variant(database: Database, sku: str) -> dict:
    return find(_product_of(database, sku)["variants"], sku, "the item")


def _pay(database: Database, customer_id: str, method_id: str, amount: int) -> None:
    """Charge a payment method, or refund to it with a negative amount.

    This is the last check before a tool changes anything.
    """
    method = find(
        database["customers"][customer_id]["payment_methods"],
        method_id,
        "for this customer, the payment method",
    )
    if method["kind"] == "gift card":
        if method["balance"] < amount:
            raise ToolRefusal(
                f"gift card {method_id} has {method['balance']} euros, and {amount} are needed"
            )
        method["balance"] -= amount
    method["paid"] += amount


_ORDER = text("Id of the order, such as W1234.")
_SKU = "Id of an item, such as S12345."
_METHOD = text("Id of a payment method of the customer.")
TOOLS = (
    Tool(
        "find_customer",
        "Finds a customer.",
        {"last_name": text("Last name."), "zip": text("ZIP code.")},
        find_customer,
    ),
    Tool(
        "list_orders",
        "All orders of a customer, with their items.",
        {"customer_id": text("Id of the customer.")},
        list_orders,
    ),
    Tool("list_products", "Names of all products.", {}, list_products),
    Tool(
        "get_product",
        "A product's variants with prices and stock.",
        {"product_id": text("Id of the product.")},
        get_product,
    ),
    Tool(
        "cancel_order",
        "Cancels a pending order and refunds it.",
        {"order_id": _ORDER},
        cancel_order,
        writes=True,
    ),
    Tool(
        "change_address",
        "Changes the address of a pending order.",
        {"order_id": _ORDER, "address": text("Street and number, ZIP code and city.")},
        change_address,
        writes=True,
    ),
    Tool(
        "return_items",
        "Takes items of a delivered order back and refunds them.",
        {"order_id": _ORDER, "skus": texts(_SKU), "refund_to": _METHOD},
        return_items,
        writes=True,
    ),
    Tool(
        "exchange_item",
        "Exchanges an item of a delivered order for another variant.",
        {"order_id": _ORDER, "sku": text(_SKU), "new_sku": text(_SKU), "payment_method": _METHOD},
        exchange_item,
        writes=True,
    ),
)


def random_write(rng: random.Random, database: Database) -> ToolCall:
    """Draw a change to an order that exists."""
    identity = rng.choice(sorted(database["orders"]))
    order = database["orders"][identity]
    methods = sorted(database["customers"][order["customer_id"]]["payment_methods"])
    sku = rng.choice(sorted(order["items"]))
    if order["status"] == "pending":
        return rng.choice(
            [
                calling("cancel_order", order_id=identity),
                calling("change_address", order_id=identity, address="Hill Road 1, 10000 Oslo"),
            ]
        )
    if rng.random() < 0.5:
        return calling("return_items", order_id=identity, skus=[sku], refund_to=rng.choice(methods))
    variants = sorted(_product_of(database, sku)["variants"]) or [sku]
    return calling(
        "exchange_item",
        order_id=identity,
        sku=sku,
        new_sku=rng.choice(variants),
        payment_method=rng.choice(methods),
    )
