"""A small MCP server over stdio without any package, whose manners a JSON file decides.

The file named by its argument holds {"tools": [...], "notify": bool, "resources": {uri: text},
"prompts": [...]}; it is read again at each request, so that a test can change the server's mind.
"""

import json
import sys
import time

SERVER = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"tools": {"listChanged": True}, "resources": {}, "prompts": {}},
    "serverInfo": {"name": "test", "version": "1"},
}


def call_tool(name, arguments):
    if name == "die":
        sys.exit(3)
    if name == "hang":
        time.sleep(3600)
    if name == "fail":
        return {"content": [{"type": "text", "text": "it broke"}], "isError": True}
    if name == "long":
        return {"content": [{"type": "text", "text": "x" * 100_000 + "end"}]}
    if name == "picture":
        return {"content": [{"type": "image", "data": "AAAA", "mimeType": "image/png"}]}
    said = f"{name}: {json.dumps(arguments, sort_keys=True)}"
    return {"content": [{"type": "text", "text": said}]}


def answer(method, params, manners):
    if method == "initialize":
        return SERVER
    if method == "tools/list":
        pages = manners.get("pages", [manners["tools"]])
        page = int(params.get("cursor", 0))
        listed = {"tools": pages[page]}
        return listed | ({"nextCursor": str(page + 1)} if page + 1 < len(pages) else {})
    if method == "tools/call":
        return call_tool(params["name"], params.get("arguments"))
    if method == "resources/list" and "resources" in manners:
        return {"resources": [{"uri": uri, "name": uri} for uri in manners["resources"]]}
    if method == "resources/read":
        uri = params["uri"]
        return {"contents": [{"uri": uri, "text": manners["resources"][uri]}]}
    if method == "prompts/list" and "prompts" in manners:
        return {"prompts": manners["prompts"]}
    if method == "prompts/get":
        text = f"{params['name']} of {json.dumps(params.get('arguments'))}"
        return {"messages": [{"role": "user", "content": {"type": "text", "text": text}}]}
    return None


def send(message):
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def main(path):
    for line in sys.stdin:
        request = json.loads(line)
        with open(path) as file:
            manners = json.load(file)
        if "id" not in request:
            continue
        result = answer(request["method"], request.get("params") or {}, manners)
        if manners.get("notify") and request["method"] == "tools/call":
            send({"method": "notifications/tools/list_changed"})
        if result is None:
            send({"id": request["id"], "error": {"code": -32601, "message": "unknown"}})
        else:
            send({"id": request["id"], "result": result})


if __name__ == "__main__":
    main(sys.argv[1])
