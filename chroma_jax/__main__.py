"""``python -m chroma_jax``."""

import sys

from chroma_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
