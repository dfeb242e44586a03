"""The words of the system: what travels and what is kept. Needs pydantic and the standard library only."""
