"""What stands before the engine: who may ask, how much, and who goes next.

Nothing here knows vLLM; it is ASGI, SQLite and asyncio around any server of OpenAI's routes.
"""
