"""What several test files share: tiny models, commands, twins, worker processes."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers looks at it
