# pyright: reportMissingImports=false, reportArgumentType=false
"""instructor: objects of pydantic's, by a named tool, whole and piece by piece."""

import json
import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field

given = json.load(sys.stdin)


class City(BaseModel):
    name: Literal["Paris", "London", "Rome"]
    rank: int = Field(ge=1, le=9)


told = {}
base = openai.OpenAI(base_url=given["url"], api_key="none", max_retries=0)
asked = {"model": given["model"], "messages": given["messages"], "temperature": 0}
asked |= {"max_tokens": 64, "max_retries": 0}
client = instructor.from_openai(base, mode=instructor.Mode.TOOLS)
told["TOOLS"] = client.chat.completions.create(response_model=City, **asked).model_dump()
*_, last = client.chat.completions.create_partial(response_model=City, **asked)
told["partial"] = last.model_dump()
client = instructor.from_openai(base, mode=instructor.Mode.JSON_SCHEMA)
told["JSON_SCHEMA"] = client.chat.completions.create(response_model=City, **asked).model_dump()
print(json.dumps(told))
