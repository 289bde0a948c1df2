import sqlite3
import sys

base = sqlite3.connect(sys.argv[1])
base.execute("create table products (id integer primary key, name text, stock integer)")
base.execute("create table moves (product integer, amount integer)")
base.executemany("insert into products values (?, ?, ?)", [(1, "lamp", 7), (2, "cup", 3), (3, "rope", 0), (4, "bell", 12), (5, "hat", 4)])
base.executemany("insert into moves values (?, ?)", [(1, 10), (1, -3), (2, 5), (2, -1), (4, 12), (5, 9), (5, -2), (5, -3), (3, 2)])
base.commit()
