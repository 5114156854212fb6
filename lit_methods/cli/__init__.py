"""The ``lit`` command."""
