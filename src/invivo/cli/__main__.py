"""``python -m invivo.cli``: the command where the script is not on the path."""

from invivo.cli.main import main

main()
