"""The stand-ins load with the libraries, as the repositories that they stand for do."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from datasets import get_dataset_config_names, load_dataset
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator
from standin_repositories import LEAKED_QUERIES, SHARED_PASSAGES, SHARED_STORIES, VOCAB_SIZE, write_repositories
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

BASE, GTE = "answerdotai/ModernBERT-base", "Alibaba-NLP/gte-modernbert-base"
GRANITE, ETTIN = "ibm-granite/granite-embedding-small-english-r2", "jhu-clsp/ettin-encoder-32m"
MSMARCO, NPR = "sentence-transformers/msmarco-msmarco-MiniLM-L6-v3", "sentence-transformers/npr"
PHILOSOPHY, FINEWIKI = "johnnyboycurtis/Philosophical-Triplets-Retrieval", "HuggingFaceFW/finewiki"
NANOBEIR, STSB = "sentence-transformers/NanoBEIR-en", "sentence-transformers/stsb"
WIKI_COLUMNS = """text id wikiname page_id title url date_modified in_language wikidata_id bytes_html wikitext version
infoboxes has_math"""
SAMPLE = "The old ferry crossed the river."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_repositories(folder)
    return folder


@pytest.fixture
def models(root):
    return root / "models"


@pytest.fixture
def stream(root):
    def open_stream(name: str, config: str | None = None, split: str = "train"):
        return load_dataset(str(root / "datasets" / name), config, split=split, streaming=True)

    return open_stream


def tensors(folder: Path) -> dict[str, torch.dtype]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", [BASE, ETTIN])
def test_masked_lms_load_with_their_head(models, name):
    folder = models / name
    assert AutoConfig.from_pretrained(folder).architectures == ["ModernBertForMaskedLM"]
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == (4 if name == BASE else 2)
    assert (folder / "model.safetensors").exists() == (name == BASE)


def test_modernbert_stores_its_decoder_once(models):
    names = tensors(models / BASE)
    assert {"model.embeddings.tok_embeddings.weight", "head.dense.weight", "head.norm.weight"} < set(names)
    assert "decoder.bias" in names
    assert "decoder.weight" not in names
    assert "model.layers.0.attn_norm.weight" not in names
    assert set(names.values()) == {torch.float32}


@pytest.mark.parametrize("name", [BASE, GTE, GRANITE, ETTIN])
def test_tokenizers_are_laid_out_like_modernberts(models, name):
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    last = VOCAB_SIZE - 83
    names = ("unk", "cls", "sep", "pad", "mask")
    assert [getattr(tokenizer, f"{one}_token_id") for one in names] == list(range(last - 5, last))
    assert len(tokenizer) == VOCAB_SIZE == AutoConfig.from_pretrained(models / name).vocab_size
    assert tokenizer.vocab_size == VOCAB_SIZE - 88  # 50,280 of 50,368
    assert tokenizer.model_max_length == 8192
    ids = tokenizer(SAMPLE, "A [MASK]  here.")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id
    assert ids.count(tokenizer.sep_token_id) == 2
    assert tokenizer.convert_tokens_to_ids("  ") in ids
    assert tokenizer.decode(tokenizer(SAMPLE)["input_ids"], skip_special_tokens=True) == SAMPLE
    merges = json.loads((models / name / "tokenizer.json").read_text())["model"]["merges"]
    assert isinstance(merges[0], str) == (name in (BASE, ETTIN))


@pytest.mark.parametrize(("name", "width", "dtype"), [(GTE, 768, torch.float16), (GRANITE, 384, torch.bfloat16)])
def test_embedding_models_keep_their_stored_precision(models, name, width, dtype):
    model = SentenceTransformer(str(models / name), device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling"]
    assert model[1].pooling_mode == "cls"
    assert model.max_seq_length == 8192
    assert model.encode([SAMPLE, "x"]).shape == (2, width)
    assert "embeddings.tok_embeddings.weight" in tensors(models / name)
    assert (models / name / "sentence_bert_config.json").exists() == (name == GRANITE)


def test_gtes_config_is_the_real_one_but_for_its_sizes(models):
    config = json.loads((models / GTE / "config.json").read_text())
    ids = {"bos": 50281, "cls": 50281, "eos": 50282, "sep": 50282, "pad": 50283}
    config |= {"num_hidden_layers": 22, "vocab_size": 50368} | {f"{name}_token_id": ids[name] for name in ids}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    digest = "8ba54dc3d35d7194f5178a4194b649f146753e02dabd22bdca5c5cbac15069ed"
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "config", "split", "columns", "rows"),
    [
        (MSMARCO, "triplet", "train", "query positive negative", 360),
        (MSMARCO, "triplet-hard-ids", "train", "query positive negative", 3),
        (PHILOSOPHY, None, "train", "query positive negative text_chunk", 240),
        (NPR, None, "train", "title body", 300),
        (FINEWIKI, "nl", "train", WIKI_COLUMNS, 12),
        (FINEWIKI, "en", "train", WIKI_COLUMNS, 300),
        (NANOBEIR, "corpus", "NanoMSMARCO", "_id text", 30),
        (NANOBEIR, "queries", "NanoHotpotQA", "_id text", 8),
        (NANOBEIR, "qrels", "NanoHotpotQA", "query-id corpus-id", 16),
        (NANOBEIR, "bm25", "NanoTouche2020", "query-id corpus-ids", 8),
        (STSB, None, "train", "sentence1 sentence2 score", 200),
        (STSB, None, "validation", "sentence1 sentence2 score", 100),
        (STSB, None, "test", "sentence1 sentence2 score", 100),
    ],
)
def test_datasets_stream(stream, name, config, split, columns, rows):
    found = list(stream(name, config, split))
    assert list(found[0]) == columns.split()
    assert len(found) == rows
    texts = [json.dumps(row) for row in found]
    assert len(set(texts)) == len(texts)


def test_configs_are_declared(root):
    declared = {name: set(get_dataset_config_names(str(root / "datasets" / name))) for name in (MSMARCO, NPR, NANOBEIR)}
    kinds = ("triplet", "triplet-50", "triplet-all", "triplet-hard")
    assert declared[MSMARCO] == {*kinds, *(f"{kind}-ids" for kind in kinds)}
    assert declared[NPR] == {"pair"}
    assert declared[NANOBEIR] == {"corpus", "queries", "qrels", "bm25"}


def test_nanobeir_is_what_the_evaluator_loads(root, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    (loaded,) = NanoBEIREvaluator(["msmarco"], dataset_id=str(root / "datasets" / NANOBEIR)).evaluators
    assert len(loaded.corpus) == 30
    assert set(LEAKED_QUERIES) < set(loaded.queries)


def test_sources_share_what_the_constants_say(stream):
    triplets, stories = list(stream(MSMARCO, "triplet")), list(stream(NPR))
    queries = {row["query"].casefold().rstrip("?") for row in triplets}
    assert queries.issuperset(LEAKED_QUERIES)
    articles = {row["text"] for row in stream(FINEWIKI, "en")}
    assert sum(f"# {row['title']}\n\n{row['body']}" in articles for row in stories) == SHARED_STORIES
    assert max(map(len, articles)) > 4000
    chunks = {row["text_chunk"] for row in stream(PHILOSOPHY)}
    assert len(chunks & {row["positive"] for row in triplets}) == SHARED_PASSAGES


def test_only_the_named_repositories_are_written(tmp_path):
    write_repositories(tmp_path, {STSB})
    assert [path.name for path in tmp_path.glob("*/*/*")] == ["stsb"]
