"""The script for a GPU, in its tiny form on the CPU."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # the benchmarks are no part of the package

from benchmarks import gpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def loud_again():
    """The script silences the library's warnings, which other tests read."""
    level = logging.getLogger("kdlib").level
    yield
    logging.getLogger("kdlib").setLevel(level)


@pytest.mark.slow
def test_the_tiny_form_measures_every_row_and_writes_them(tmp_path, capsys):
    gpu.main(["--tiny", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert found["tiny"] and found["device"] == ("CPU" if not torch.cuda.is_available() else found["device"])
    for name in ("fp32, teacher live", "fp32, teacher cached", "batches of 128 tokens"):
        assert rows[name]["tokens_per_second"] > 0 and 0 < rows[name]["share_of_peak"] < 1
    assert next(row for name, row in rows.items() if name.startswith("loss"))["largest_difference"] < 1e-3
    assert 0 <= rows["fine-tuning on 150 rows"]["score"] <= 1
    assert "fp32, teacher live" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing():
    before = gpu.TARGET.exists()
    with pytest.raises(SystemExit, match="no GPU on this machine"):
        gpu.main([])
    assert gpu.TARGET.exists() == before


def test_no_row_is_begun_after_the_time_is_over(monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS", -1)
    rows = gpu.rows_of(gpu.TINY, CPU)
    assert len(rows) == 1 and rows[0]["note"] == "left out: the time was over"


def test_texts_have_mixed_lengths_and_about_as_many_tokens_as_asked():
    texts = gpu.texts_of(gpu.TINY, 5000)
    assert 4000 < texts.tokens < 6000 and len(set(texts.lengths.tolist())) > 10
