"""``python -m invivo.demo``: what ``make demo`` runs."""

from __future__ import annotations

import argparse
import signal
import sys

from invivo.demo.show import run_demo
from invivo.errors import InvivoError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m invivo.demo", description=run_demo.__doc__)
    parser.add_argument("--exit", action="store_true", help="end after the tables")
    parser.add_argument("--json", action="store_true", help="measurements as JSON")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the server too
    try:
        run_demo(port=given.port, stay=sys.stdin.isatty() and not given.exit, as_json=given.json)
    except InvivoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
