"""What the tests share beside fixtures: tiny models, rows, plain references, runs.

The environment is set here, before anything imports torch or the libraries.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for anything
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process a core; tiny models gain nothing from threads
if not os.environ.get("TESTS_ON_GPU"):  # what most tests compare with lies on the CPU; see test_gpu.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
