#!/bin/bash
cd /app/downloads && python3 - <<'END'
import pathlib
kept = {}
for path in sorted(pathlib.Path(".").iterdir(), key=lambda path: (len(path.name), path.name)):
    content = path.read_bytes()
    if content in kept:
        path.unlink()
    else:
        kept[content] = path
for path in kept.values():
    folder = pathlib.Path(path.suffix[1:].lower() or "other")
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)
END
