"""Stand-ins for the Hugging Face repositories that the recipe names: the form of the real ones, made-up content.

`write_repositories(root)` writes `root/models/<owner>/<name>/` and `root/datasets/<owner>/<name>/`. File names, keys,
dtypes, tensor names, configs, splits and columns are those of the repositories as their public copies showed them; a
comment says where each was read, and what no public copy could confirm. Layers, vocabulary and rows are fewer; weights
and texts come from seeded generators.
"""

import functools
import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from helpers import SENTENCES
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer.evaluation.nano_beir import DATASET_NAME_TO_HUMAN_READABLE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# The queries of NanoMSMARCO that rows of MS MARCO's config `triplet` repeat, one of them in other case and punctuation.
LEAKED_QUERIES = (
    "how long does the ferry take to cross the northern strait",
    "why do copper roofs turn green after many years",
    "what is the difference between a canal and a river",
)
SHARED_STORIES = 6  # stories of NPR that FineWiki's English articles repeat word for word
SHARED_PASSAGES = 8  # positives of MS MARCO that the philosophy set repeats as `text_chunk`

# The real vocabulary is 50,368 entries, of which the last 88 are five special tokens and 83 unused ones, and
# config.vocab_size is 50,368 too: https://huggingface.co/answerdotai/ModernBERT-base/blob/main/tokenizer_config.json
VOCAB_SIZE = 1024
UNUSED = 83
SPECIAL = {name: VOCAB_SIZE - UNUSED - 5 + place for place, name in enumerate(("UNK", "CLS", "SEP", "PAD", "MASK"))}

_ENGLISH = """\
amber ancient annual brisk broad calm careful central coastal cold common curious deep distant eastern early fertile
foreign formal gentle golden grand hidden hollow humble inland iron later local lonely lower marble middle modern narrow
northern older open outer patient plain polished private quiet rapid regional royal rural sandy shallow silver simple
slender smaller southern steady stone sudden thin timber upper urban useful warm western wide wooden younger

account archive argument barn basin belief bell bridge builder canal captain castle cavern chapel citizen clock colony
composer council custom dialogue engine engineer estate factory farmer ferry festival forest garden glacier granary
harbour hospital hotel island journal judge kiln lantern lecture letter library lighthouse machine market meadow
merchant mill miner monument museum novel orchard painter palace parliament pasture pilot poet poem pottery prison
railway reason report reservoir river road sailor school sculptor senate settlement shipyard song station statue teacher
temple theatre theory tower treaty tunnel valley vessel village vineyard voyage weaver workshop

abandoned accepted admired answered borrowed built carried changed chose collected compared copied crossed defended
described divided doubted enlarged explained followed found guarded improved inspected joined kept measured moved
observed offered opened ordered painted photographed praised prepared protected reached rebuilt recorded refused
repaired replaced restored returned sold studied supplied surveyed taught visited watched

above across after against along around before behind beside beyond near inside outside past through

Later Meanwhile Eventually Soon Often Afterwards Elsewhere Instead Surprisingly Gradually"""
_ADJECTIVES, _NOUNS, _VERBS, _LINKS, _OPENINGS = (words.split() for words in _ENGLISH.split("\n\n"))


class Words:
    """English-like text from a seed. A topic is an adjective and a noun, which its sentences keep coming back to."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)

    def topic(self) -> str:
        return f"{self.random.choice(_ADJECTIVES)} {self.random.choice(_NOUNS)}"

    def title(self) -> str:
        return f"{self.topic()} {self.random.choice(_LINKS)} the {self.topic()}".title()

    def sentence(self, topic: str | None = None) -> str:
        verb, link = self.random.choice(_VERBS), self.random.choice(_LINKS)
        core = f"the {topic or self.topic()} {verb} the {self.topic()} {link} the {self.topic()}"
        kind = self.random.randrange(4)
        if kind == 0:
            return f"{self.random.choice(_OPENINGS)}, {core}."
        if kind == 1:
            return f"In {self.random.randrange(1450, 2025)} {core}, and {self.random.choice(_VERBS)} it again."
        if kind == 2:
            return f"{core[0].upper()}{core[1:]}, with {self.random.randrange(3, 900)} {self.random.choice(_NOUNS)}s."
        return f"{core[0].upper()}{core[1:]}."

    def paragraph(self, topic: str, sentences: int) -> str:
        return " ".join(self.sentence(topic if self.random.random() < 0.7 else None) for _ in range(sentences))

    def passage(self, topic: str) -> str:
        return self.paragraph(topic, self.random.randint(1, 2))

    def question(self, topic: str) -> str:
        start = self.random.choice(("why was the", "who first visited the", "what happened to the", "where is the"))
        return f"{start} {topic} {self.random.choice(_LINKS)} the {self.topic()}"


def write_repositories(root: Path, only: Collection[str] | None = None) -> None:
    """Write the stand-ins.

    Args:
        root: folder; `models/` and `datasets/` are made in it.
        only: ids to write, such as `sentence-transformers/npr`; all by default.
    """
    for kind, writers in (("models", MODELS), ("datasets", DATASETS)):
        for name, write in writers.items():
            if only is None or name in only:
                folder = root / kind / name
                folder.mkdir(parents=True)
                write(folder)


# Models


def write_modernbert_base(folder: Path) -> None:
    """Keys: https://huggingface.co/unsloth/ModernBERT-base/blob/main/config.json, a copy of the config of
    https://huggingface.co/answerdotai/ModernBERT-base/blob/main/config.json, whose last change is commit 5756c58.

    Files: https://huggingface.co/answerdotai/ModernBERT-base/tree/6e461621ae9e2dffc138de99490e9baee354deb5. Its commit
    "Purge duplicate decoder.weight, rely on tied weights instead" is why no `decoder.weight` is stored. 4 of 22 layers.
    """
    config = _config("ModernBertForMaskedLM", 768, 1152, layers=4, heads=12)
    config |= {"_name_or_path": "ModernBERT-base", "tie_word_embeddings": True, "transformers_version": "4.47.0.dev0"}
    for key in ("sparse_pred_ignore_index", "sparse_prediction"):
        del config[key]
    _write_json(folder / "config.json", config, sort=True)
    save_file(_masked_lm(config), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder, merges_as_strings=True)
    _write_beside(folder, "license: apache-2.0\nlibrary_name: transformers\npipeline_tag: fill-mask", "onnx/model.onnx")


def write_gte(folder: Path) -> None:
    """Files: https://huggingface.co/Alibaba-NLP/gte-modernbert-base/tree/50bc194fa1abff9a0b5734c864cc8269eaa59627 and
    .../tree/main: there is no sentence_bert_config.json, so `max_seq_length` comes from the tokenizer and the config.

    Keys of config.json: those below, with 22 layers, the real ids and a newline at the end, have the file's size and
    SHA-256, 1,184 bytes and 8ba54dc3..., as told by https://github.com/KalebKE/cairn's manifest of models.
    modules.json: these two modules make 229 bytes, the size there. config_sentence_transformers.json: the size there is
    205 bytes, as these keys with these versions give; the versions themselves are not confirmed. Half precision: 298 MB
    for 149 M parameters and pytorch_model.bin's `torch.HalfStorage` (.../tree/refs%2Fpr%2F7). Not confirmed: the names
    without `model.`, which go with the class in `architectures`, and the false keys of 1_Pooling. 2 of 22 layers.
    """
    config = _config("ModernBertModel", 768, 1152, layers=2, heads=12) | {"torch_dtype": "float16"}
    _write_json(folder / "config.json", config, sort=True)
    save_file(_encoder(config, "", torch.float16), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    _write_pooling(folder, 768, modes, include_prompt=True)
    versions = {"sentence_transformers": "3.3.1", "transformers": "4.48.0", "pytorch": "2.5.1+cu124"}
    rest = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write_json(folder / "config_sentence_transformers.json", {"__version__": versions, **rest})
    _write_beside(folder, "license: apache-2.0\npipeline_tag: sentence-similarity", "onnx/model.onnx")


def write_granite_small(folder: Path) -> None:
    """Files and sizes of https://huggingface.co/ibm-granite/granite-embedding-small-english-r2/tree/main as listed by a
    downloader that checked them: modules.json 230 bytes (these two modules), sentence_bert_config.json 55 bytes,
    1_Pooling/config.json 191 bytes (four modes, no `include_prompt`), model.safetensors 95,332,048 bytes.

    That last size is, to the byte, the size of bfloat16 tensors named without `model.`. CLS pooling, 8,192 tokens and
    sizes: its .../raw/main/config.json and 1_Pooling/config.json as quoted in public notes. Not confirmed: the other
    keys of config.json, which has 1,315 bytes, and config_sentence_transformers.json, which is therefore left out.
    2 of 12 layers.
    """
    config = _config("ModernBertModel", 384, 1536, layers=2, heads=12)
    config |= {"global_rope_theta": 80000, "reference_compile": None, "repad_logits_with_grad": False}
    config |= {"torch_dtype": "bfloat16", "transformers_version": "4.51.3"}
    _write_json(folder / "config.json", config, sort=True)
    save_file(_encoder(config, "", torch.bfloat16), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    _write_pooling(folder, 384, ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"))
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 8192, "do_lower_case": False})
    _write_beside(folder, "license: apache-2.0\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity")


def write_ettin(folder: Path) -> None:
    """Files: https://huggingface.co/jhu-clsp/ettin-encoder-32m/tree/main. There are no safetensors: its only weights
    are pytorch_model.bin, float32, 128 MB, as much as 10 layers and a head without a decoder.weight of its own.

    Sizes, 7,999 positions and both thetas at 160,000: its config as copied into
    https://huggingface.co/knowledgator/gliner-pii-edge-v1.0/raw/main/gliner_config.json, where vocab_size is 50370 for
    two tokens more. `sans_pos`: the config of a larger sibling. Not confirmed: the other keys, and whether the pickle
    names the tied decoder.weight. 2 of 10 layers.
    """
    config = _config("ModernBertForMaskedLM", 384, 576, layers=2, heads=6)
    config |= {"local_rope_theta": 160000.0, "max_position_embeddings": 7999, "position_embedding_type": "sans_pos"}
    _write_json(folder / "config.json", config | {"transformers_version": "4.48.0"}, sort=True)
    torch.save(_masked_lm(config), folder / "pytorch_model.bin")
    _write_tokenizer(folder, merges_as_strings=True)
    _write_beside(folder, "license: mit\nlibrary_name: transformers\npipeline_tag: feature-extraction")


def _config(architecture: str, width: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """The keys that transformers 4.48 wrote for a ModernBERT of random weights stored in float32."""
    zeros = dict.fromkeys(("attention_dropout", "classifier_dropout", "embedding_dropout", "mlp_dropout"), 0.0)
    absent = ("attention_bias", "classifier_bias", "deterministic_flash_attn", "gradient_checkpointing", "mlp_bias")
    ids = {"bos": "CLS", "cls": "CLS", "eos": "SEP", "sep": "SEP", "pad": "PAD"}
    return {
        "architectures": [architecture],
        **zeros,
        **dict.fromkeys((*absent, "norm_bias", "sparse_prediction"), False),
        **{f"{name}_token_id": SPECIAL[token] for name, token in ids.items()},
        "classifier_activation": "gelu",
        "classifier_pooling": "mean",
        "decoder_bias": True,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "hidden_activation": "gelu",
        "hidden_size": width,
        "initializer_cutoff_factor": 2.0,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_norm_eps": 1e-05,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "model_type": "modernbert",
        "norm_eps": 1e-05,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "position_embedding_type": "absolute",
        "sparse_pred_ignore_index": -100,
        "torch_dtype": "float32",
        "transformers_version": "4.48.0.dev0",
        "vocab_size": VOCAB_SIZE,
    }


def _encoder(config: Mapping[str, Any], prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights under the names of a ModernBertModel; its first layer has no `attn_norm`."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"embeddings.tok_embeddings": (VOCAB_SIZE, width), "embeddings.norm": (width,)}
    for layer in range(config["num_hidden_layers"]):
        if layer:
            shapes[f"layers.{layer}.attn_norm"] = (width,)
        attention = {"attn.Wqkv": (3 * width, width), "attn.Wo": (width, width)}
        mlp = {"mlp_norm": (width,), "mlp.Wi": (2 * inner, width), "mlp.Wo": (width, inner)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in (attention | mlp).items()}
    shapes["final_norm"] = (width,)
    generator = torch.Generator().manual_seed(0)
    return {f"{prefix}{name}.weight": _weight(shape, generator).to(dtype) for name, shape in shapes.items()}


def _masked_lm(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of a ModernBertForMaskedLM whose decoder is tied to the embeddings."""
    width, generator = config["hidden_size"], torch.Generator().manual_seed(1)
    head = {"head.dense.weight": _weight((width, width), generator), "head.norm.weight": torch.ones(width)}
    return _encoder(config, "model.") | head | {"decoder.bias": torch.zeros(VOCAB_SIZE)}


def _weight(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator).mul_(0.02)


@functools.cache
def _tokenizer() -> str:
    """A byte-level BPE tokenizer in the layout of ModernBERT's, as JSON.

    In front `|||IP_ADDRESS|||` and `<|padding|>`, then pieces, runs of 24 to 2 spaces, two more masks of personal data,
    `<|endoftext|>`, [UNK], [CLS], [SEP], [PAD], [MASK] with `lstrip`, and [unused0] to [unused82].
    """
    first = ["|||IP_ADDRESS|||", "<|padding|>"]
    late = [" " * spaces for spaces in range(24, 1, -1)]
    late += ["|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "<|endoftext|>"]
    last = [*(f"[{name}]" for name in SPECIAL), *(f"[unused{number}]" for number in range(UNUSED))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(f"[{name}]", SPECIAL[name]) for name in ("CLS", "SEP")],
    )
    trainer = trainers.BpeTrainer(
        vocab_size=SPECIAL["UNK"] - len(late),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = Words("tokenizer")
    tokenizer.train_from_iterator([*SENTENCES, *(words.sentence() for _ in range(2000))], trainer)
    saved = json.loads(tokenizer.to_str())
    vocabulary = saved["model"]["vocab"]
    assert len(vocabulary) + len(late) == SPECIAL["UNK"]
    for token in late:
        vocabulary[token] = len(vocabulary)
    ids = vocabulary | {token: SPECIAL["UNK"] + place for place, token in enumerate(last)}
    special = {"<|padding|>", "<|endoftext|>", *(f"[{name}]" for name in SPECIAL)}
    flags = {"single_word": False, "rstrip": False}
    saved["added_tokens"] = [
        {"id": ids[token], "content": token, "lstrip": token == "[MASK]", **flags}
        | {"normalized": token not in special, "special": token in special}
        for token in (*first, *late, *last)
    ]
    return json.dumps(saved)


def _write_tokenizer(folder: Path, merges_as_strings: bool = False) -> None:
    """tokenizer.json and its two companions.

    ModernBERT-base and Ettin have the older form of tokenizer.json, 2.13 MB with merges as strings; gte and granite the
    newer one, 3.58 MB with merges as pairs (sizes in the lists of files above).
    """
    tokenizer = json.loads(_tokenizer())
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]}
    if merges_as_strings:
        tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    _write_json(folder / "tokenizer.json", tokenizer)
    names = {f"{name.lower()}_token": f"[{name}]" for name in SPECIAL}
    # Keys: https://huggingface.co/answerdotai/ModernBERT-base/blob/main/tokenizer_config.json; not all were confirmed
    # for the other three, which differ by some 30 bytes of 20,800.
    config = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": True, "model_max_length": 8192, **names}
    config |= {"model_input_names": ["input_ids", "attention_mask"], "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / "tokenizer_config.json", config)
    flags = {"normalized": False, "rstrip": False, "single_word": False}
    special = {name: {"content": token, "lstrip": token == "[MASK]", **flags} for name, token in names.items()}
    _write_json(folder / "special_tokens_map.json", special)


def _write_pooling(folder: Path, width: int, modes: Sequence[str], **more: bool) -> None:
    """CLS pooling with the keys of sentence-transformers before 6, and modules.json with the old types."""
    (folder / "1_Pooling").mkdir()
    keys = {f"pooling_mode_{mode}": mode == "cls_token" for mode in modes}
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **keys, **more})
    named = (("", "Transformer"), ("1_Pooling", "Pooling"))
    types = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{name}"}
        for idx, (path, name) in enumerate(named)
    ]
    _write_json(folder / "modules.json", types)


def _write_beside(folder: Path, card: str, *more: str) -> None:
    """The model card, .gitattributes, and files of weights that nobody may read."""
    (folder / "README.md").write_text(f"---\n{card}\nlanguage:\n- en\n---\n# A stand-in\n")
    lines = [f"*.{kind} filter=lfs diff=lfs merge=lfs -text\n" for kind in ("bin", "onnx", "parquet", "safetensors")]
    (folder / ".gitattributes").write_text("".join(lines))
    for name in ("pytorch_model.bin", *more):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"not weights: only safetensors may be read\n")


def _write_json(path: Path, value: Any, sort: bool = False) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n")


# Datasets


def write_msmarco(folder: Path) -> None:
    """Configs and folders, under its former name:
    https://huggingface.co/datasets/sentence-transformers/msmarco-msmarco-MiniLM-L-6-v3/tree/main and its viewer.
    Columns: the README of its sibling msmarco-distilbert-margin-mse-cls-dot-v2, which has the same eight configs.

    Shards: 20 of triplet-hard and 1 of triplet-ids in that tree, 39 of triplet-all in public download code. One file
    for `triplet` follows from its sibling's download_size of 239 MB. Not confirmed: the other numbers of shards.
    Configs other than `triplet` have three rows, and so no more than three of their shards.
    """
    words, rows = Words("msmarco"), []
    for _ in range(360):
        topic = words.topic()
        rows.append([words.question(topic), words.passage(topic), words.passage(words.topic())])
    for place, passage in enumerate(_shared_passages()):
        rows[40 * place][1] = passage
    leaked = (*LEAKED_QUERIES[:2], f"{LEAKED_QUERIES[2].title()}?")
    for place, row in enumerate(rows[7::10]):  # so often that any sample of the rows has some
        row[0] = leaked[place % len(leaked)]
    columns = ["query", "positive", "negative"]
    tables = {"triplet": _table(columns, rows)}
    for kind in ("triplet", "triplet-50", "triplet-all", "triplet-hard"):
        names = [*columns[:2], *(f"negative_{place}" for place in range(1, 51))] if "50" in kind else columns
        tables[f"{kind}-ids"] = _table(names, [range(start, start + len(names)) for start in (0, 100, 200)])
        if kind != "triplet":
            tables[kind] = _table(names, [[words.passage(words.topic()) for _ in names] for _ in range(3)])
    shards = {"triplet-all": 39, "triplet-hard": 20}
    _write_dataset(folder, {config: {"train": table} for config, table in tables.items()}, shards)


def write_philosophy(folder: Path) -> None:
    """Columns and the split `train` of the default config: public code that reads
    https://huggingface.co/datasets/johnnyboycurtis/Philosophical-Triplets-Retrieval. Not confirmed: the order of the
    columns, the names of the files, and whether the card declares them.
    """
    words, shared = Words("philosophy"), _shared_passages()
    rows = []
    for place in range(240):
        topic = words.topic()
        positive = words.passage(topic)
        chunk = shared[place] if place < SHARED_PASSAGES else f"{words.sentence(topic)} {positive}"
        rows.append((words.sentence(topic), positive, words.passage(words.topic()), chunk))
    table = _table(["query", "positive", "negative", "text_chunk"], rows)
    _write_dataset(folder, {"default": {"train": table}})


def write_npr(folder: Path) -> None:
    """Config `pair`, the only one: https://huggingface.co/datasets/sentence-transformers/npr/blob/main/README.md;
    three shards: https://huggingface.co/datasets/sentence-transformers/npr/tree/main/pair.
    """
    words, stories = Words("npr"), _shared_stories()
    stories += [(words.title(), words.paragraph(words.topic(), words.random.randint(1, 3))) for _ in range(294)]
    _write_dataset(folder, {"pair": {"train": _table(["title", "body"], stories)}}, {"pair": 3})


# Twelve of the columns and their order: public code that reads the dataset and the dataset's own extraction code, which
# is in its folder src/; `wikitext` likewise. Not confirmed: the types, the place of `infoboxes`, its JSON in a string.
_FINEWIKI = {
    **dict.fromkeys(("text", "id", "wikiname"), pa.string()),
    "page_id": pa.int64(),
    **dict.fromkeys(("title", "url", "date_modified", "in_language", "wikidata_id"), pa.string()),
    "bytes_html": pa.int64(),
    "wikitext": pa.string(),
    "version": pa.int64(),
    "infoboxes": pa.string(),
    "has_math": pa.bool_(),
}


def write_finewiki(folder: Path) -> None:
    """Files: public code names data/enwiki/000_00000.parquet to 000_00014.parquet, data/ptwiki and data/zhwiki of
    https://huggingface.co/datasets/HuggingFaceFW/finewiki/tree/main and loads the configs `en`, `nl`, `cs`. Not
    confirmed: how the card writes the patterns, and that it has no `dataset_info`. Three shards of English, one of
    Dutch and of Portuguese.
    """
    articles = {language: _articles(language, count) for language, count in (("en", 300), ("nl", 12), ("pt", 12))}
    for language, texts in articles.items():
        rows = [_finewiki_row(language, number, *text) for number, text in enumerate(texts)]
        size = 100 if language == "en" else len(rows)
        for shard, start in enumerate(range(0, len(rows), size)):
            table = pa.Table.from_pylist(rows[start : start + size], schema=pa.schema(list(_FINEWIKI.items())))
            path = folder / f"data/{language}wiki/000_{shard:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
    _write_card(folder, {language: {"train": f"data/{language}wiki/*"} for language in articles})


def _articles(language: str, count: int) -> list[tuple[str, str]]:
    """Titles and texts: most of some paragraphs, every thirtieth of several thousand characters in sections."""
    words, articles = Words(f"finewiki {language}"), []
    for number in range(count):
        topic, title = words.topic(), words.title()
        blocks = [words.paragraph(topic, words.random.randint(1, 2)) for _ in range(words.random.randint(1, 2))]
        if number % 30 == 29:
            blocks += [f"## {words.title()}\n{words.paragraph(topic, 12)}" for _ in range(4)]
        articles.append((title, f"# {title}\n" + "\n\n".join(blocks)))
    if language == "en":
        articles[:SHARED_STORIES] = [(title, f"# {title}\n\n{body}") for title, body in _shared_stories()]
    return articles


def _finewiki_row(language: str, number: int, title: str, text: str) -> dict[str, Any]:
    page_id = 10_000 + 37 * number
    return {
        "text": text,
        "id": f"{language}wiki/{page_id}",
        "wikiname": f"{language}wiki",
        "page_id": page_id,
        "title": title,
        "url": f"https://{language}.wikipedia.org/wiki/{title.replace(' ', '_')}",
        "date_modified": f"2025-07-{1 + number % 28:02}T10:00:00Z",
        "in_language": language,
        "wikidata_id": f"Q{page_id}" if number % 10 else None,
        "bytes_html": 20 * len(text),
        "wikitext": f"'''{title}''' {text}",
        "version": 1_290_000_000 + number,
        "infoboxes": "[]",
        "has_math": False,
    }


def write_nanobeir(folder: Path) -> None:
    """Files such as corpus/NanoMSMARCO-00000-of-00001.parquet and the configs `corpus`, `queries`, `qrels`, `bm25`:
    public download code for https://huggingface.co/datasets/sentence-transformers/NanoBEIR-en at its revision beb106f.
    Sets, splits and columns: NanoBEIREvaluator and CrossEncoderNanoBEIREvaluator of sentence-transformers 6.
    """
    tables: dict[str, dict[str, pa.Table]] = {config: {} for config in ("corpus", "queries", "qrels", "bm25")}
    for name in DATASET_NAME_TO_HUMAN_READABLE.values():
        words, split = Words(f"nanobeir {name}"), f"Nano{name}"
        topics = [words.topic() for _ in range(30)]
        documents = {f"{name}-d{number}": words.passage(topic) for number, topic in enumerate(topics)}
        queries = {f"{name}-q{number}": words.question(topic) for number, topic in enumerate(topics[:8])}
        if name == "MSMARCO":
            queries |= dict(zip(queries, LEAKED_QUERIES, strict=False))
        relevant = list(zip(queries, documents, strict=False))
        if name == "HotpotQA":  # two documents a query
            relevant += list(zip(queries, list(documents)[8:], strict=False))
        ranked = [(query, words.random.sample(list(documents), len(documents))) for query in queries]
        tables["corpus"][split] = _table(["_id", "text"], documents.items())
        tables["queries"][split] = _table(["_id", "text"], queries.items())
        tables["qrels"][split] = _table(["query-id", "corpus-id"], relevant)
        tables["bm25"][split] = _table(["query-id", "corpus-ids"], ranked)
    _write_dataset(folder, tables)


def write_stsb(folder: Path) -> None:
    """https://huggingface.co/datasets/sentence-transformers/stsb/blob/main/README.md and .../tree/main/data."""
    words, tables = Words("stsb"), {}
    for split, count in (("train", 200), ("validation", 100), ("test", 100)):
        rows = []
        for _ in range(count):
            first, kept = words.sentence(), words.random.random()  # the share of words kept is the score
            second = [one if words.random.random() < kept else words.random.choice(_NOUNS) for one in first.split()]
            rows.append((first, " ".join(second), round(kept, 2)))
        tables[split] = _table(["sentence1", "sentence2", "score"], rows)
    _write_dataset(folder, {"default": tables})


def _shared_stories() -> list[tuple[str, str]]:
    words = Words("shared stories")
    return [(words.title(), words.paragraph(words.topic(), 2)) for _ in range(SHARED_STORIES)]


def _shared_passages() -> list[str]:
    words = Words("shared passages")
    return [words.paragraph(words.topic(), 2) for _ in range(SHARED_PASSAGES)]


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pa.Table:
    return pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))


def _write_dataset(
    folder: Path, tables: Mapping[str, Mapping[str, pa.Table]], shards: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Tables by config and split as `push_to_hub` of datasets lays them out, in as many `shards` a config, or one."""
    patterns: dict[str, dict[str, str]] = {}
    for config, splits in tables.items():
        count, place = shards.get(config, 1), "data" if config == "default" else config
        patterns[config] = {split: f"{place}/{split}-*" for split in splits}
        (folder / place).mkdir()
        for split, table in splits.items():
            size = -(-table.num_rows // count)
            for shard, start in enumerate(range(0, table.num_rows, size)):
                file = folder / place / f"{split}-{shard:05}-of-{count:05}.parquet"
                pq.write_table(table.slice(start, size), file)
    _write_card(folder, patterns, [_info(config, splits) for config, splits in tables.items()])


def _info(config: str, splits: Mapping[str, pa.Table]) -> dict[str, Any]:
    """What a card's `dataset_info` says of a config."""
    kinds = {"string": {"dtype": "string"}, "int64": {"dtype": "int64"}, "double": {"dtype": "float64"}}
    features = [
        {"name": field.name, **kinds.get(str(field.type), {"list": "string"})}
        for field in next(iter(splits.values())).schema
    ]
    counts = [{"name": name, "num_bytes": one.nbytes, "num_examples": one.num_rows} for name, one in splits.items()]
    return {"config_name": config, "features": features, "splits": counts}


def _write_card(
    folder: Path, patterns: Mapping[str, Mapping[str, str]], info: Sequence[dict[str, Any]] | None = None
) -> None:
    """README.md whose front matter declares files by config and split."""
    configs = [
        {"config_name": config, "data_files": [{"split": split, "path": path} for split, path in paths.items()]}
        for config, paths in patterns.items()
    ]
    front = {"language": ["en"], **({"dataset_info": list(info)} if info else {}), "configs": configs}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# A stand-in\n")


MODELS: dict[str, Callable[[Path], None]] = {
    "answerdotai/ModernBERT-base": write_modernbert_base,
    "Alibaba-NLP/gte-modernbert-base": write_gte,
    "ibm-granite/granite-embedding-small-english-r2": write_granite_small,
    "jhu-clsp/ettin-encoder-32m": write_ettin,
}
DATASETS: dict[str, Callable[[Path], None]] = {
    "sentence-transformers/msmarco-msmarco-MiniLM-L6-v3": write_msmarco,
    "johnnyboycurtis/Philosophical-Triplets-Retrieval": write_philosophy,
    "sentence-transformers/npr": write_npr,
    "HuggingFaceFW/finewiki": write_finewiki,
    "sentence-transformers/NanoBEIR-en": write_nanobeir,
    "sentence-transformers/stsb": write_stsb,
}
