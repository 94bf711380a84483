"""No test asks the hub: before anything imports huggingface_hub, which reads this once."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

# The files that take longest, in this order before all others, or one worker would wait for the other in the end.
LONGEST = (
    "test_compile test_methods test_real_models test_offloading test_fuzz test_generate test_browser test_docs "
    "test_families test_saved test_operators_on_cpu test_evaluation test_planning test_cli test_ruler test_harness "
    "test_compare test_modes test_parallel test_ahead test_masks test_capture test_app"
).split()


def pytest_collection_modifyitems(items):
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    """What has been imported stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()
