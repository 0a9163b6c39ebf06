"""``python -m torchrl_mac.datasets``: the same as ``torchrl-mac-data``."""

import sys

from torchrl_mac.datasets.cli import main

# Worker processes import this module under another name.
if __name__ == "__main__":
    sys.exit(main())
