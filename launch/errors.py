"""Errors that end the command: one line that names the place, and an exit code."""

from __future__ import annotations


class LaunchError(Exception):
    """Something outside the configuration is in the way (exit code 1)."""

    exit_code = 1


class ConfigError(LaunchError):
    """The configuration cannot be used (exit code 2). Each line of `str(error)` names one place."""

    exit_code = 2
