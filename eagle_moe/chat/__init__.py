"""Talking to a model: a session, and the terminal around it."""
