"""Text that was not meant for a corpus, through phase 1 and the tokenisers of the others."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
from helpers import load_script, tiny_tokenizer

from modernbert_small.packed.tokens import text_tokenizer, tokenize_split
from modernbert_small.pretrain.masking import MaskedLMDataset

SCRIPT = "mlm/create_dataset.py"
LIMIT = 64


def hostile(size, copies):
    """Texts by what is wrong with them; `size` characters of the long ones, so many copies of the repeated one."""
    ordinary = [f"An ordinary sentence, the one with the number {i}." for i in range(60)]
    return {
        "ordinary": ordinary,
        "empty": ["", " \t\n\u00a0\u2003 ", "\x00\x00", "\ufeff"],
        "too short": ["\U0001f600" * 50, "--", "...!?"],
        "one line": ["word " * (size // 5)],
        "no spaces": ["x" * size, "\u4f60\u597d" * (size // 20)],
        "surrogates": ["a lone \ud800 surrogate and \udfff another"],
        "nul": ["a nul \x00 byte in the middle", "\x1b[31mcolours\x1b[0m of a terminal"],
        "right to left": ["\u202e\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627"],
        "combining": ["three words with e" + "\u0301" * 500],
        "special": ["[MASK]", "[CLS] [SEP] [PAD] [UNK]", "before [MASK] after [SEP]", "[MASK]" * 200],
        "copies": ["the same text again and again"] * copies,
    }


def run_phase_1(folder, monkeypatch, texts):
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    lines = "\n".join(json.dumps({"text": text}) for of_kind in texts.values() for text in of_kind)
    (folder / "own.jsonl").write_text(lines)
    monkeypatch.chdir(folder)
    flags = ["--sources", "own=own.jsonl", "--tokenizer_name_or_path", "tokenizer", "--output_dir", "corpus"]
    flags += ["--max_seq_length", str(LIMIT), "--validation_rows", "10"]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *flags])
    load_script(SCRIPT).main()
    return tokenizer


def check(folder, tokenizer, texts):
    files = sorted((folder / "corpus").glob("*.parquet"))
    corpus = [text for file in files for text in pq.read_table(file)["text"].to_pylist()]
    record = json.loads((folder / "corpus" / "run.json").read_text())
    dropped = record["dropped"]["own"]
    assert record["read"]["own"]["texts"] == sum(map(len, texts.values()))
    assert dropped["empty"] == len(texts["empty"])
    assert dropped["too_short"] == len(texts["too short"])
    assert dropped["duplicate"] >= len(texts["copies"]) - 1
    assert corpus.count(texts["copies"][0]) == 1
    assert set(texts["ordinary"]) <= set(corpus)
    assert {"[MASK]", "before [MASK] after [SEP]", "a nul byte in the middle"} <= set(corpus)
    unlimited = text_tokenizer(tokenizer, 1 << 30)
    for encoding in unlimited.encode_batch(corpus):
        assert len(encoding) <= LIMIT
        assert not set(encoding.ids[1:-1]) & set(tokenizer.all_special_ids)

    store = tokenize_split(folder / "corpus", "train", "text", tokenizer, LIMIT)
    assert store.truncated == 0
    dataset = MaskedLMDataset(store, tokenizer, 0.3)
    tokens, _ = store.gather(np.arange(len(dataset)))
    assert tokens.max() < len(tokenizer)


def test_hostile_texts_are_kept_cut_or_counted(tmp_path, monkeypatch):
    texts = hostile(20_000, 300)
    check(tmp_path, run_phase_1(tmp_path, monkeypatch, texts), texts)
