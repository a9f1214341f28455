"""JSON bodies. One encoder for whole answers and for the events of a stream."""

from typing import Any

import msgspec
from starlette.responses import Response

encode_json = msgspec.json.Encoder().encode


class JSONResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)
