"""``python -m lit_methods`` is the ``lit`` command."""

from lit_methods.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
