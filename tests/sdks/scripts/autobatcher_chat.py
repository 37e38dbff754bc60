"""autobatcher: chats as responses in the background, embeddings as a batch."""

import asyncio
import os

from autobatcher import BatchOpenAI


async def main() -> None:
    client = BatchOpenAI(
        base_url=os.environ["OPENAI_BASE_URL"],
        api_key="none",
        batch_window_seconds=0.5,
        poll_interval_seconds=0.5,
    )
    async with client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(
                    model="smollm2-135m-instruct",
                    messages=[{"role": "user", "content": f"flour {n}"}],
                )
                for n in range(10)
            )
        )
        assert all(answer.choices[0].message.content for answer in answers)
        vectors = await client.embeddings.create(model="all-minilm-l6-v2", input="flour")
        assert len(vectors.data[0].embedding) > 1


asyncio.run(main())
