"""Which tokens are kept, and why."""

import itertools
import json

import numpy as np
import pytest
from pruning.pairs import edit, unknowns
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdlib.errors import UserError
from kdlib.models.tokenizer_files import token_list
from kdlib.pruning.selection import (
    count_tokens,
    coverage_curve,
    main_script,
    script_of,
    select_by_coverage,
    select_tokens,
    word_list,
)
from kdlib.pruning.tokenizer import prune_tokenizer


def test_reasons_cover_exactly_the_kept_tokens(study):
    chosen = study.chosen
    assert chosen.ids == sorted(set(chosen.ids)) == sorted(chosen.reason)
    assert set(chosen.reason.values()) <= {"special", "character", "corpus", "wordlist", "merge"}
    assert {i for i, why in chosen.reason.items() if why == "special"} == set(study.tokenizer.all_special_ids)
    assert set(np.flatnonzero(chosen.counts)) <= set(chosen.ids)


def test_counts_are_how_often_the_corpus_uses_a_piece(study):
    expected = np.zeros(len(token_list(study.tokenizer)), int)
    for text in study.corpus:
        for i in study.tokenizer(text, add_special_tokens=False).input_ids:
            expected[i] += 1
    assert study.chosen.counts.tolist() == expected.tolist()


def test_counts_do_not_depend_on_batches_or_padding(study):
    study.tokenizer(study.corpus[:3], padding="max_length", truncation=True, max_length=9)
    counts = count_tokens(study.tokenizer, (text for text in study.corpus), batch=7)
    assert counts.tolist() == study.chosen.counts.tolist()
    assert count_tokens(study.tokenizer, ["", *study.corpus, ""]).tolist() == counts.tolist()


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_characters_of_other_scripts_go_unless_all_are_asked_for(kind, studies):
    study = studies(kind)
    tokens = token_list(study.tokenizer)
    everything = set(select_tokens(study.tokenizer, study.corpus, characters="all").ids)
    foreign = {i for i, token in enumerate(tokens) if len(token) == 1 and script_of(token) & {"Cyrl", "Hani", "Thai"}}
    assert foreign and foreign <= everything and not foreign & set(study.chosen.ids)
    neutral = {i for i, token in enumerate(tokens) if len(token) == 1 and not script_of(token)}
    assert {tokens[i] for i in neutral} >= set("0123.,:%") and neutral <= set(study.chosen.ids)


def test_byte_alphabet_is_kept_whole(studies):
    study = studies("bpe")
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(study.small.get_vocab())
    for text in ("Дождь", "日本語", "😀", "\x00\x7f", "ฝน"):
        assert study.small.decode(study.small(text).input_ids, skip_special_tokens=True) == text


def test_bpe_piece_is_kept_with_all_it_is_merged_from(studies):
    study = studies("bpe")
    model = json.loads(study.small.backend_tokenizer.to_str())["model"]
    made = {left + right for left, right in model["merges"]}
    special = set(study.small.all_special_tokens)
    assert all(token in made for token in model["vocab"] if len(token) > 1 and token not in special)
    merged = [i for i, why in study.chosen.reason.items() if why == "merge"]
    assert merged and not study.chosen.counts[merged].any()


def test_rows_run_out_for_the_rarest_tokens_first(study):
    least = len(select_tokens(study.tokenizer, study.corpus[:1], characters="all").ids)
    limit = (least + len(study.chosen.ids)) // 2
    chosen = select_tokens(study.tokenizer, study.corpus, words=["magandang"], max_rows=limit)
    assert len(chosen.ids) <= limit and chosen.dropped > 0
    assert "wordlist" not in chosen.reason.values() or study.kind.startswith("bpe")
    left_out = set(np.flatnonzero(chosen.counts)) - set(chosen.ids)
    assert len(left_out) == chosen.dropped
    if not study.kind.startswith("bpe"):
        assert len(chosen.ids) == limit
        rarest_kept = min(chosen.counts[i] for i, why in chosen.reason.items() if why == "corpus")
        assert max(chosen.counts[i] for i in left_out) <= rarest_kept
    small = prune_tokenizer(study.tokenizer, chosen.ids)
    for text in study.corpus:
        assert unknowns(small, text) <= unknowns(study.tokenizer, text)


def test_words_fill_the_rows_that_are_left_in_their_order(studies):
    study = studies("unigram")
    base = select_tokens(study.tokenizer, study.corpus[:20])
    words = ["rain", "wedding", "guests", "garden", "lluvia", "jardín", "pengantin"]
    full = select_tokens(study.tokenizer, study.corpus[:20], words=words)
    some = select_tokens(study.tokenizer, study.corpus[:20], words=words, max_rows=len(base.ids) + 3)
    assert len(base.ids) < len(some.ids) <= len(base.ids) + 3 < len(full.ids)
    assert set(base.ids) <= set(some.ids) <= set(full.ids)
    assert some.dropped == 0
    small = prune_tokenizer(study.tokenizer, full.ids)
    for word in words:
        assert [full.ids[i] for i in small(word).input_ids] == study.tokenizer(word).input_ids


def test_extra_texts_are_kept_even_if_the_corpus_lacks_them(studies):
    study = studies("wordpiece")
    prefix = "Дождь начался:"
    chosen = select_tokens(study.tokenizer, study.corpus, extra=[prefix])
    small = prune_tokenizer(study.tokenizer, chosen.ids)
    assert [chosen.ids[i] for i in small(prefix).input_ids] == study.tokenizer(prefix).input_ids


def test_too_few_rows_are_refused(study):
    with pytest.raises(UserError, match="vocabulary.max_rows is 20"):
        select_tokens(study.tokenizer, study.corpus, max_rows=20)


@pytest.mark.parametrize("texts", [[], [""], ["", "   ", "\n"]])
def test_corpus_without_text_is_refused(texts, studies):
    study = studies("unigram")
    with pytest.raises(UserError, match="no text"):
        select_tokens(study.tokenizer, texts)


def test_tokenizer_of_another_kind_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "ang": 1, "bata": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="WordLevel"):
        select_tokens(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"), ["ang bata"])


def test_bpe_that_marks_the_ends_of_words_is_refused():
    backend = Tokenizer(models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"))
    with pytest.raises(UserError, match="'</w>'"):
        select_tokens(PreTrainedTokenizerFast(tokenizer_object=backend), ["a b"])


def test_byte_tokens_are_kept():
    spelled = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    vocabulary = [("<unk>", 0.0), ("▁a", -2.0), ("▁", -3.0), ("b", -4.0), ("bb", -3.5), *spelled]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    chosen = select_tokens(tokenizer, ["1 2"])
    small = prune_tokenizer(tokenizer, chosen.ids)
    assert [token_list(small)[i] for i in (0, 1)] == ["<unk>", "▁"] and len(chosen.ids) == 256 + 2
    assert unknowns(small, "Дождь 日本") == 0
    assert [chosen.ids[i] for i in small("Дождь 日本").input_ids] == tokenizer("Дождь 日本").input_ids


def test_special_tokens_that_nobody_declared_are_kept(tokenizers, corpus):
    backend = edit(tokenizers("wordpiece").backend_tokenizer, lambda spec: spec.update(added_tokens=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    chosen = select_tokens(tokenizer, corpus)
    small = prune_tokenizer(tokenizer, chosen.ids)
    assert {"[UNK]", "[CLS]", "[SEP]"} <= set(small.get_vocab())
    for text in [*corpus, "Дождь"]:
        ids = [chosen.ids[i] for i in small(text).input_ids]
        assert ids == tokenizer(text).input_ids or text == "Дождь"


def test_unknown_piece_says_nothing_about_scripts(tokenizers):
    tokenizer = tokenizers("wordpiece")
    chosen = select_tokens(tokenizer, ["Дождь", "ꙮꙮ"])
    kept = {token for i, token in enumerate(token_list(tokenizer)) if i in chosen.reason and len(token) == 1}
    assert "ж" in kept and "a" not in kept


def test_coverage_rises_to_what_the_kept_rows_cover(study, parallel):
    unseen = count_tokens(study.tokenizer, [row["tgl"] for row in parallel[300:340]])
    for counts, share in ((study.chosen.counts, 1.0), (unseen, unseen[study.chosen.ids].sum() / unseen.sum())):
        curve = coverage_curve(study.chosen, counts)
        assert curve[-1] == (len(study.chosen.ids), pytest.approx(share))
        for (fewer, lower), (more, higher) in itertools.pairwise(curve):
            assert fewer < more and lower <= higher


@pytest.mark.parametrize("code", ["tgl", "tl", "fil"])
def test_words_of_tagalog_come_most_frequent_first(code):
    words = word_list(code, 500)
    assert words[:2] == ["sa", "Sa"] and {"ng", "ang", "mga", "hindi"} <= set(words[:100])
    assert 900 < len(words) <= 1000
    assert word_list(code, 10) == words[:20]


def test_all_words_come_by_default():
    assert len(word_list("tgl")) > 30_000


def test_no_words_when_none_are_asked_for():
    assert word_list("tgl", 0) == []


@pytest.mark.parametrize("code", ["xyz", "ceb", "und", "art"])
def test_language_without_words_gives_none(code):
    assert word_list(code) == []


@pytest.mark.parametrize("code", ["Tagalog", "not a code", "q", ""])
def test_what_is_no_language_code_is_refused(code):
    with pytest.raises(UserError, match="language"):
        word_list(code)


@pytest.mark.parametrize(
    "token, scripts",
    [
        ("a", {"Latn"}), ("ñ", {"Latn"}), ("▁a", {"Latn"}), ("##a", {"Latn"}), ("Ġa", {"Latn"}),
        ("▁Дож", {"Cyrl"}), ("漢", {"Hani"}), ("##漢", {"Hani"}), ("漢a", {"Hani", "Latn"}), ("ไทย", {"Thai"}),
        ("7", set()), ("▁2026", set()), ("▁", set()), ("##", set()), ("!?", set()), ("😀", set()),
        ("\u0303", set()), ("", set()), ("<0x41>", set()),
    ],
)  # fmt: skip
def test_script_of_a_piece(token, scripts):
    assert script_of(token) == scripts
    assert main_script(token) == ("mixed" if len(scripts) > 1 else (*scripts, "neutral")[0])


# -- sized by coverage


@pytest.mark.parametrize("share", [0.6, 0.9, 0.97])
def test_coverage_gives_the_fewest_rows_that_reach_it_in_every_language(study, share):
    heldout = [study.corpus[:40], study.corpus[40:]]
    counts = [count_tokens(study.tokenizer, lines) for lines in heldout]

    def reached(selection):
        return min(c[selection.ids].sum() / c.sum() for c in counts)

    found = select_by_coverage(study.tokenizer, study.corpus, coverage=share, heldout=heldout)
    assert share <= reached(found) and len(found.ids) < len(study.chosen.ids)
    least = sum(why in ("special", "character") for why in found.reason.values())
    if len(found.ids) > least + 1:
        assert reached(select_tokens(study.tokenizer, study.corpus, max_rows=len(found.ids) - 1)) < share


def test_coverage_out_of_reach_is_told(tokenizers):
    tokenizer, text = tokenizers("unigram"), ["ang bata"]
    with pytest.warns(UserWarning, match="not reached: all rows cover"):
        found = select_by_coverage(tokenizer, text, coverage=0.999, heldout=[["Magandang umaga sa inyong lahat"]])
    assert found.ids == select_tokens(tokenizer, text).ids
