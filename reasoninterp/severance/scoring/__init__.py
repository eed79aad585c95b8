"""Scores against planted truth, and the competitors that are scored beside `locate`."""
