# pyright: reportMissingImports=false, reportArgumentType=false, reportOptionalMemberAccess=false
"""Send every row with openai-python; tell class, status, code and number of requests of each."""

import json
import sys

import httpx2 as httpx
import openai

given = json.load(sys.stdin)
results = {}


def ask(row: dict, client: openai.OpenAI) -> None:
    if row["body"].get("stream"):
        for _ in client.chat.completions.create(**row["body"]):
            pass
        return
    options = {"headers": row["headers"]}
    if row["method"] == "get":
        client.get(row["path"], cast_to=object, options=options)
    elif row["raw"] is not None:
        headers = {"Content-Type": "application/json"}
        client.post(
            row["path"], cast_to=object, content=row["raw"].encode(), options={"headers": headers}
        )
    else:
        client.post(row["path"], cast_to=object, body=row["body"], options=options)


for row in given["rows"]:
    sent = []
    http = httpx.Client(event_hooks={"request": [sent.append]})
    result = {"error": "", "status": 200, "code": None}
    with openai.OpenAI(base_url=given["url"], api_key=row["key"], http_client=http) as client:
        try:
            ask(row, client)
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            result = {"error": type(error).__name__, "status": status, "code": error.code}
    results[row["name"]] = result | {"requests": len(sent)}
print(json.dumps(results))
