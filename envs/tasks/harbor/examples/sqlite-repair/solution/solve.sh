#!/bin/bash
cd /app && python3 - <<'END'
import sqlite3
base = sqlite3.connect("shop.db")
rows = base.execute("select p.id, p.name, p.stock, coalesce(sum(m.amount), 0) from products p left join moves m on m.product = p.id group by p.id").fetchall()
wrong = [(total, number, name) for number, name, stock, total in rows if stock != total]
base.executemany("update products set stock = ? where id = ?", [(total, number) for total, number, _ in wrong])
base.commit()
open("corrected.txt", "w").write("".join(f"{name}\n" for name in sorted(name for _, _, name in wrong)))
END
