# pyright: reportMissingImports=false, reportArgumentType=false
"""openai-agents: an agent that must use its tool, over both APIs, whole and streamed."""

import asyncio
import json
import sys
from typing import Literal

import agents
import openai

given = json.load(sys.stdin)
agents.set_tracing_disabled(True)
used = []


@agents.function_tool
def get_weather(city: Literal["Paris", "London"], days: Literal[1, 2, 3]) -> str:
    """The weather of a city."""
    used.append([city, days])
    return f"Sunny in {city}."


async def main() -> dict[str, object]:
    told = {}
    async with openai.AsyncOpenAI(base_url=given["url"], api_key="none", max_retries=0) as client:
        for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
            agent = agents.Agent(
                name="Weather",
                instructions="You tell the weather.",
                model=kind(model=given["model"], openai_client=client),
                model_settings=agents.ModelSettings(
                    tool_choice="required", temperature=0, max_tokens=64, parallel_tool_calls=False
                ),
                tools=[get_weather],
            )
            question = given["messages"][0]["content"]
            whole = await agents.Runner.run(agent, question)
            streamed = agents.Runner.run_streamed(agent, question)
            async for _ in streamed.stream_events():
                pass
            told[kind.__name__] = [whole.final_output, streamed.final_output]
    return told


told = asyncio.run(main())
print(json.dumps(told | {"used": used}))
