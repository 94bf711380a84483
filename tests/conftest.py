"""No test asks the hub: before anything imports huggingface_hub, which reads this once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
