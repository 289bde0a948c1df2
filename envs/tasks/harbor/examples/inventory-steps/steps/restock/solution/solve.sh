#!/bin/bash
cd /app && python3 - <<'END'
import csv
rows = list(csv.DictReader(open("inventory.csv")))
known = {row["item"]: row for row in rows}
for row in csv.DictReader(open("deliveries-today.csv")):
    if row["item"] not in known:
        known[row["item"]] = {"item": row["item"], "stock": 0, "least": 1}
    known[row["item"]]["stock"] = int(known[row["item"]]["stock"]) + int(row["amount"])
with open("inventory.csv", "w") as out:
    writer = csv.DictWriter(out, ["item", "stock", "least"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(known.values())
END
