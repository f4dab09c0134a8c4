"""kdlib: from a massively multilingual transformer to a small single-language encoder, every step measured.

Start with the notebooks, or with `kdlib.study.Study`, which they call.
"""
