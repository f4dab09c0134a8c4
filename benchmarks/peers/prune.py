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
start, processor = time.perf_counter(), time.process_time()
prune_files(folder, out, ids)
spent = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
print(json.dumps(spent | {"megabytes": peak_megabytes()}))
