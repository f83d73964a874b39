"""``python -m storaged`` is the command ``storaged``."""

from storaged.cli.main import main

main()
