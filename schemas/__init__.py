"""The words of the system: what travels on topics and over HTTP, and what is kept. Needs pydantic and the standard library only."""
