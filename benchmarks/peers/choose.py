"""The kit's choice of tokens for the embedded corpus, measured: python choose.py FOLDER IDS; prints JSON."""

import json
import sys
import time

import numpy as np

from benchmarks.peak import peak_megabytes
from kdlib.config import Corpus
from kdlib.data.corpus import load_corpus, sentences
from kdlib.models.tokenizer_files import full_tokenizer
from kdlib.pruning.selection import select_tokens, word_list

folder, target = sys.argv[1:]
texts, words = sentences(load_corpus(Corpus(), "tgl", 0).train), word_list("tgl")
start = time.process_time()
tokenizer = full_tokenizer(folder)
loaded = time.process_time()
ids = select_tokens(tokenizer, texts, words).ids
np.save(target, ids)
end = time.process_time()
print(
    json.dumps(
        {"load": loaded - start, "choose": end - loaded, "megabytes": peak_megabytes(), "rows": len(tokenizer)}
        | {"kept": len(ids)}
    )
)
