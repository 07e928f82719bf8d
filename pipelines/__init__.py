"""Flows, their parameters and the `fourm` command: what a person starts, schedules and cancels."""
