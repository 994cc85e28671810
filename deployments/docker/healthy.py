"""Whether a server in this container answers well: the health check of compose.yaml.

python deployments/docker/healthy.py 4200/api/health
"""

from __future__ import annotations

import sys
import urllib.request


def main(address: str) -> int:
    """0 when http://127.0.0.1:ADDRESS answers with 200, else 1."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{address}", timeout=5) as answer:
            return int(answer.status != 200)
    except OSError as error:
        print(f"{address}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
