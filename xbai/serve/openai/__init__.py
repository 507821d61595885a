"""Routes that any OpenAI client can ask: `/v1/chat/completions`, `/v1/responses`, `/v1/models`."""
