"""The kit's pruning of a folder, measured as its peers are: python prune.py FOLDER OUT IDS; prints JSON."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.peak import peak_megabytes
from kdlib.pruning.files import prune_files

folder, out, ids = Path(sys.argv[1]), Path(sys.argv[2]), np.load(sys.argv[3])
shutil.rmtree(out, ignore_errors=True)
start = time.perf_counter()
prune_files(folder, out, ids)
print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": peak_megabytes()}))
