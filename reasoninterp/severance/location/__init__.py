"""Locate: whether the path was cut, where, how, and with what confidence."""
