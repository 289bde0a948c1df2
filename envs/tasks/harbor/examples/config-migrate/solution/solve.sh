#!/bin/bash
cd /app && python3 - <<'END'
import configparser, json, re
old = configparser.ConfigParser()
old.read("server.ini")
def value(text):
    if re.fullmatch(r"\d+", text):
        return int(text)
    if re.fullmatch(r"\d+[hm]", text):
        return int(text[:-1]) * {"h": 3600, "m": 60}[text[-1]]
    return {"yes": True, "no": False}.get(text, text)
new = {name: {key + "_dir" * (name == "paths"): value(text) for key, text in old[name].items()} for name in old.sections() if name != "old"}
json.dump(new, open("server.json", "w"), indent=2)
END
