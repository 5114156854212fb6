"""``python -m lit_methods`` is the ``lit`` command."""

from lit_methods.import_path import current_folder_last

current_folder_last()  # before a library is imported

from lit_methods.cli.main import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
