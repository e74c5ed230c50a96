"""Teachers and students in the on-disk forms that published models have, labelled and trained like any other.

Each model has random weights, but its folder holds what a repository's does: weights in half precision, boolean
pooling keys, a Dense module, prompts under several names, a tokenizer of its architecture's class. What is right is
sentence-transformers' own `encode` of the folder in float32.
"""

import json
import logging
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from helpers import SENTENCES, run_in_process, tiny_modernbert, tiny_tokenizer
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from modernbert_small.distil.static import token_features
from modernbert_small.label.labeller import Labeller
from modernbert_small.label.teacher import with_projection
from modernbert_small.run import devices
from modernbert_small.run.loading import load_sentence_transformer

PHASE_3, PHASE_4, PHASE_5 = "mlm/pre_train.py", "create_distil_dataset.py", "distil_train.py"
CPU = torch.device("cpu")
WIDTH, NARROW, MAX_LENGTH = 32, 16, 48
TEXTS = [*SENTENCES, "a", "Of the CAT", " the dog lay ", "water\nboils", " ".join(SENTENCES * 4), SENTENCES[1][:30]]
KINDS = ["document", "query", "document", "document", "query", "query", "document", "query", "document", "query"]
NO_PROMPTS = {"query": "", "document": ""}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LEGACY_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# What an architecture's repositories name their tokenizer, its special tokens in the order of their ids, and how a text
# is wrapped in them.
TOKENIZERS = {
    "bert": ("BertTokenizer", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "[CLS] $A [SEP]"),
    "mpnet": ("MPNetTokenizer", ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], "<s> $A </s>"),
    "xlm-roberta": ("XLMRobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>"),
    "t5": ("T5Tokenizer", ["<pad>", "</s>", "<unk>"], "$A </s>"),
    "qwen3": ("Qwen2Tokenizer", ["<|endoftext|>"], "$A <|endoftext|>"),
}
ROLES = {"pad": ("pad", "endoftext"), "unk": ("unk",), "cls": ("cls", "s"), "sep": ("sep", "/s"), "mask": ("mask",)}
BPE_ROLES = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
MODELS = {
    "bert": ("BertConfig", "BertModel", {"max_position_embeddings": 64}),
    "mpnet": ("MPNetConfig", "MPNetModel", {"pad_token_id": 1, "max_position_embeddings": MAX_LENGTH + 2}),
    # As in the original, a longest text fills the positions, of which the first is that after the padding's id.
    "xlm-roberta": (
        "XLMRobertaConfig",
        "XLMRobertaModel",
        {"pad_token_id": 1, "max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1},
    ),
    "t5": ("T5Config", "T5EncoderModel", {"d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3Model", {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {"max_position_embeddings": 64, "local_attention": 16, "num_hidden_layers": 3},
    ),
}


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Labels are compared closely; what bf16 adds is a test of its own."""
    monkeypatch.setattr(devices, "has_bf16", lambda device: False)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of tokenizers by architecture, as their repositories hold them."""
    root = tmp_path_factory.mktemp("tokenizers")
    tiny_tokenizer(root / "modernbert")
    for architecture in TOKENIZERS:
        write_tokenizer(root / architecture, architecture)
    return root


def write_tokenizer(folder, architecture):
    name, special, template = TOKENIZERS[architecture]
    letters = sorted(set("".join(TEXTS)) | set("abcdefghijklmnopqrstuvwxyz"))
    words = sorted({word.strip(",.:;") for text in TEXTS for word in text.split()})
    if architecture in ("bert", "mpnet"):
        vocabulary = dict.fromkeys([*special, *letters, *("##" + letter for letter in letters), *words])
        ids = {token: index for index, token in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif architecture == "qwen3":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, *special])}, []))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        pieces = dict.fromkeys(["▁", *letters, *("▁" + word for word in words)])
        scored = [(token, 0.0) for token in special] + [(piece, -2.0 - len(piece) / 9) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(scored, unk_id=special.index("<unk>")))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    used = [(token, tokenizer.token_to_id(token)) for token in special if token in template]
    wrap = processors.TemplateProcessing(single=template, special_tokens=used)
    # Qwen3-Embedding's byte-level step stands before the one that appends the end of the text.
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, wrap]) if architecture == "qwen3" else wrap
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    bare = {token.strip("[]<>|").lower(): token for token in special}
    roles = {f"{role}_token": bare[key] for role, keys in ROLES.items() for key in keys if key in bare}
    if architecture == "qwen3":
        roles = BPE_ROLES | {"padding_side": "left"}
    elif "</s>" in special:
        roles |= {"eos_token": "</s>"} | ({"bos_token": "<s>"} if "<s>" in special else {})
    config = {"tokenizer_class": name, "model_max_length": 512, **roles}
    if architecture == "bert":
        config["do_lower_case"] = False
    if architecture == "t5":
        config["extra_ids"] = 0
    write_json(folder / "tokenizer_config.json", config)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_encoder(folder, tokenizers, architecture, dtype="float32", dtype_key="torch_dtype"):
    """Configuration, weights and tokenizer as transformers' repositories hold them."""
    shutil.copytree(tokenizers / architecture, folder, dirs_exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config_name, model_name, own = MODELS[architecture]
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.3}
    sizes |= {"pad_token_id": tokenizer.pad_token_id}
    sizes |= {"d_model": WIDTH} if architecture == "t5" else {"hidden_size": WIDTH}
    config = getattr(transformers, config_name)(vocab_size=len(tokenizer), **(sizes | own))
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config)
    for parameter in model.parameters():  # norms and biases too, which a new model has at one and zero
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    config.architectures = [model_name]
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written.pop("dtype", None)
    write_json(folder / "config.json", written | {dtype_key: dtype})
    weights = {name: value.to(DTYPES[dtype]).contiguous() for name, value in model.state_dict().items()}
    if architecture == "t5":
        weights.pop("encoder.embed_tokens.weight")  # the same as shared.weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_teacher(
    folder,
    tokenizers,
    architecture="bert",
    dtype="float32",
    dtype_key="torch_dtype",
    pooling="mean",
    legacy=True,
    normalize=True,
    dense=(),
    prompts=None,
    default_prompt_name=None,
    truncate_dim=None,
    do_lower_case=False,
):
    """A folder in the form of a sentence-transformers repository; each of `dense` is (width, bias, activation)."""
    write_encoder(folder, tokenizers, architecture, dtype, dtype_key)
    names = ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalize]
    paths = ["" if index == 0 else f"{index}_{name}" for index, name in enumerate(names)]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_LENGTH, "do_lower_case": do_lower_case})
    if legacy:
        modes = {key: mode == pooling for mode, key in LEGACY_KEYS.items()}
        write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": WIDTH, **modes})
    else:
        config = {"embedding_dimension": WIDTH, "pooling_mode": pooling, "include_prompt": True}
        write_json(folder / "1_Pooling/config.json", config)
    width = WIDTH
    for index, (out, bias, activation) in enumerate(dense, 2):
        config = {"in_features": width, "out_features": out, "bias": bias, "activation_function": activation}
        write_json(folder / f"{index}_Dense/config.json", config)
        weights = {"linear.weight": torch.randn(out, width) / 6} | ({"linear.bias": torch.randn(out)} if bias else {})
        weights = {name: value.to(DTYPES[dtype]) for name, value in weights.items()}
        save_file(weights, folder / f"{index}_Dense/model.safetensors")
        width = out
    settings = {
        "__version__": {"sentence_transformers": "2.2.2", "transformers": "4.30.0", "pytorch": "2.0.0"},
        "prompts": prompts or {},
        "default_prompt_name": default_prompt_name,
    }
    write_json(
        folder / "config_sentence_transformers.json",
        settings if truncate_dim is None else settings | {"truncate_dim": truncate_dim},
    )
    return folder


def encode(folder, prompts=NO_PROMPTS, texts=TEXTS, **options):
    """Unit vectors of sentence-transformers' own `encode` in float32, each text with its kind's prompt."""
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, **options).float()
    return by_kind(texts, {kind: partial(model.encode, prompt=prompt) for kind, prompt in prompts.items()})


def by_kind(texts, embed):
    """Unit vectors of texts, each embedded by its kind's function."""
    rows = {kind: [row for row, other in enumerate(KINDS) if other == kind] for kind in embed}
    vectors = {kind: embed[kind]([texts[row] for row in rows[kind]]) for kind in embed}
    out = np.empty((len(texts), vectors["query"].shape[1]), np.float32)
    for kind, found in vectors.items():
        out[rows[kind]] = found
    return unit(out)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_same(got, expected, mean=0.999999, lowest=0.99999):
    assert got.shape == expected.shape
    cosines = (unit(got.astype(np.float32)) * expected).sum(1)
    assert cosines.mean() >= mean, cosines
    assert cosines.min() >= lowest, cosines
    between = expected @ expected.T
    assert between[np.triu_indices(len(between), 1)].min() < 0.99, "the texts are all alike, so nothing was tested"


def labels_of(teacher, labeller=None):
    labeller = labeller or Labeller(teacher, CPU, 200, "auto")
    return labeller.embed(labeller.tokenize(TEXTS, KINDS))


def check_labels(folder, prompts=NO_PROMPTS, projected=True):
    """Labels of the teacher as wide as it is, and of the teacher with a projection, are what `encode` gives."""
    expected = encode(folder, prompts)
    teacher = load_sentence_transformer("--teacher_name_or_path", str(folder))
    assert {value.dtype for value in teacher.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert_same(labels_of(with_projection(teacher, None)), expected)
    if not projected:
        return
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(expected.shape[1], 12)))[0]
    reduced = with_projection(teacher, basis)
    labels = labels_of(reduced)
    reduced.save_pretrained(str(folder / "reduced"), create_model_card=False)
    kept = SentenceTransformer(str(folder / "reduced"), device="cpu")
    vectors = by_kind(TEXTS, {"query": kept.encode_query, "document": kept.encode_document})
    assert_same(labels, vectors)
    assert_same(vectors, unit(expected @ basis))


# transformers 4 writes torch_dtype (gte-modernbert-base: float16), transformers 5 dtype.
@pytest.mark.parametrize(
    ("dtype", "dtype_key"),
    [("float16", "torch_dtype"), ("float16", "dtype"), ("bfloat16", "dtype")],
)
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_weights_of_any_precision(tmp_path, tokenizers, architecture, dtype, dtype_key):
    folder = write_teacher(tmp_path / "teacher", tokenizers, architecture, dtype, dtype_key, pooling="cls")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {DTYPES[dtype]}
    check_labels(folder)


# Repositories of before 2026 have a boolean key for each pooling, those written since one key.
@pytest.mark.parametrize(
    ("pooling", "legacy", "normalize"),
    [("cls", True, True), ("cls", False, False), ("mean", True, False), ("lasttoken", False, True)],
    ids=["cls-boolean_keys-normalize", "cls-one_key", "mean-boolean_keys", "lasttoken-one_key-normalize"],
)
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_poolings(tmp_path, tokenizers, architecture, pooling, legacy, normalize):
    folder = write_teacher(
        tmp_path / "teacher", tokenizers, architecture, pooling=pooling, legacy=legacy, normalize=normalize
    )
    check_labels(folder, projected=False)


TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"
FORMS = {
    # Half precision, the first token, no Normalize, a query prompt that stands beside an empty one.
    "mxbai-embed-large-v1": (
        {
            "dtype": "float16",
            "pooling": "cls",
            "normalize": False,
            "prompts": {"query": "Represent this sentence for searching relevant passages: ", "passage": ""},
        },
        {"query": "Represent this sentence for searching relevant passages: ", "document": ""},
    ),
    "granite-embedding-small-english-r2": ({"architecture": "modernbert", "dtype": "bfloat16", "pooling": "cls"}, {}),
    "all-mpnet-base-v2": ({"architecture": "mpnet"}, {}),
    "multilingual-e5-base": (
        {"architecture": "xlm-roberta", "prompts": {"query": "query: ", "passage": "passage: "}},
        {"query": "query: ", "document": "passage: "},
    ),
    "bge-m3": ({"architecture": "xlm-roberta", "dtype": "float16", "pooling": "cls"}, {}),
    "Qwen3-Embedding-0.6B": (
        {
            "architecture": "qwen3",
            "dtype": "bfloat16",
            "pooling": "lasttoken",
            "prompts": {"query": "Instruct: Find it\nQuery:", "document": ""},
        },
        {"query": "Instruct: Find it\nQuery:"},
    ),
    # A projection of its own, without a bias or an activation.
    "sentence-t5-base": (
        {"architecture": "t5", "dtype": "float16", "dense": [(24, False, IDENTITY)]},
        {},
    ),
    "LaBSE": ({"dtype": "float16", "pooling": "cls", "dense": [(WIDTH, True, TANH)]}, {}),
    # No Normalize after the Dense, so that the Tanh is the last module.
    "distiluse-base-multilingual-cased": ({"normalize": False, "dense": [(24, True, TANH)]}, {}),
    # Two projections, the first wider than the encoder.
    "embeddinggemma-300m": (
        {
            "dtype": "bfloat16",
            "dense": [(48, False, IDENTITY), (WIDTH, False, IDENTITY)],
            "prompts": {"query": "task: search | query: ", "document": "title: none | text: "},
        },
        {"query": "task: search | query: ", "document": "title: none | text: "},
    ),
    # nomic's names, where encode_query knows only the name query.
    "nomic-embed-text-v1.5": (
        {
            "architecture": "modernbert",
            "prompts": {"search_query": "search_query: ", "search_document": "search_document: "},
        },
        {"query": "search_query: ", "document": "search_document: "},
    ),
    # One prompt for all texts, under a name that says nothing of their kind.
    "a default prompt": (
        {"prompts": {"retrieval": "Represent: "}, "default_prompt_name": "retrieval"},
        {"query": "Represent: ", "document": "Represent: "},
    ),
    # A cased tokenizer before which the model's texts were lower-cased, as older sentence-transformers did it.
    "do_lower_case": ({"do_lower_case": True}, {}),
    "do_lower_case, byte-level": ({"architecture": "modernbert", "do_lower_case": True}, {}),
    # Matryoshka: the first values alone, cut after the last module.
    "truncate_dim": ({"truncate_dim": NARROW}, {}),
    "truncate_dim, ModernBERT in bfloat16": (
        {"architecture": "modernbert", "dtype": "bfloat16", "truncate_dim": NARROW, "normalize": False},
        {},
    ),
    "truncate_dim after a Dense": ({"truncate_dim": NARROW, "dense": [(24, True, TANH)]}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_published_models(tmp_path, tokenizers, form):
    options, prompts = FORMS[form]
    folder = write_teacher(tmp_path / "teacher", tokenizers, **options)
    check_labels(folder, NO_PROMPTS | prompts)
    if prompts:  # or the comparison would not notice a prompt left out
        plain, prompted = encode(folder), encode(folder, NO_PROMPTS | prompts)
        assert (plain * prompted).sum(1).min() < 0.99
    if options.get("do_lower_case"):
        lower = encode(folder, texts=[text.lower() for text in TEXTS])
        assert_same(encode(folder), lower)


@pytest.mark.parametrize("architecture", MODELS)
def test_bf16_is_close(tmp_path, tokenizers, architecture, monkeypatch):
    monkeypatch.setattr(devices, "has_bf16", lambda device: True)
    pooling = "lasttoken" if architecture == "qwen3" else "mean"
    folder = write_teacher(tmp_path / "teacher", tokenizers, architecture, "bfloat16", pooling=pooling)
    teacher = load_sentence_transformer("--teacher_name_or_path", str(folder))
    labels, exact = labels_of(teacher), encode(folder)
    assert_same(labels, exact, mean=0.9999, lowest=0.999)
    assert np.abs(unit(labels) - exact).max() > 1e-4, "bf16 was not used"


@pytest.mark.parametrize("architecture", MODELS)
def test_on_a_gpu_a_copy_in_bf16_embeds_and_the_teacher_stays_as_it_is(tmp_path, tokenizers, architecture, monkeypatch):
    monkeypatch.setattr("modernbert_small.label.labeller._embeds_in_bf16", lambda device: True)
    pooling = "lasttoken" if architecture == "qwen3" else "mean"
    folder = write_teacher(tmp_path / "teacher", tokenizers, architecture, "float32", pooling=pooling)
    teacher = load_sentence_transformer("--teacher_name_or_path", str(folder))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    labeller = Labeller(teacher, CPU, 200, "auto")
    assert {value.dtype for value in labeller.model[0].auto_model.parameters()} == {torch.bfloat16}
    assert torch.bfloat16 not in {value.dtype for value in labeller.model[0].auto_model.buffers()}  # RoPE needs more
    assert_same(labels_of(None, labeller), encode(folder), mean=0.999, lowest=0.99)
    for name, value in labeller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_tokenizers_are_what_they_stand_for(tokenizers):
    ids = {name: transformers.AutoTokenizer.from_pretrained(tokenizers / name) for name in MODELS}
    assert ids["xlm-roberta"].pad_token_id == ids["mpnet"].pad_token_id == 1
    assert ids["qwen3"].padding_side == "left"
    assert ids["qwen3"]("a")["input_ids"][-1] == ids["qwen3"].eos_token_id
    for name, (class_name, _, _) in TOKENIZERS.items():
        assert type(ids[name]).__name__ == class_name
        assert len(ids[name]("The cat")["input_ids"]) > 2, name


def test_unknown_prompt_names_are_said(tmp_path, tokenizers, caplog):
    prompts = {"query": "query: ", "passage": "passage: ", "clustering": "cluster: "}
    teacher = SentenceTransformer(str(write_teacher(tmp_path / "teacher", tokenizers, prompts=prompts)), device="cpu")
    with caplog.at_level(logging.WARNING):
        Labeller(teacher, CPU, 200, "auto")
    (message,) = [message for message in caplog.messages if "not used" in message]
    assert "not used: clustering; used: {'query': 'query: ', 'document': 'passage: '}" in message


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a script beside a corpus of queries and documents."""
    rng = np.random.default_rng(0)
    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    texts = [" ".join(rng.choice(words, rng.integers(4, 20))) for _ in range(60)]
    kinds = [("document", "query")[row % 2] for row in range(60)]
    (tmp_path / "data/corpus").mkdir(parents=True)
    for split, rows in (("train", slice(0, 48)), ("validation", slice(48, 60))):
        columns = {"text": texts[rows], "source": ["own"] * len(texts[rows]), "kind": kinds[rows]}
        pq.write_table(pa.table(columns), tmp_path / f"data/corpus/{split}-00000-of-00001.parquet")

    def call(script, *flags):
        return run_in_process(script, tmp_path, capsys, *flags)

    return call


@pytest.mark.parametrize(
    ("embedding_dim", "options"),
    [
        (
            NARROW,
            {
                "architecture": "xlm-roberta",
                "dtype": "bfloat16",
                "prompts": {"query": "query: ", "passage": "passage: ", "clustering": "cluster: "},
            },
        ),
        (NARROW, {"architecture": "modernbert", "truncate_dim": NARROW}),
        (12, {"dtype": "float16", "truncate_dim": NARROW, "do_lower_case": True}),
    ],
    ids=["projected, both prompts", "as wide as it cuts itself", "narrower than it cuts itself"],
)
def test_phase_4_keeps_what_it_labelled_with(tmp_path, tokenizers, run, embedding_dim, options):
    folder = write_teacher(tmp_path / "own", tokenizers, **options)
    flags = ["--teacher_name_or_path", "own", "--embedding_dim", str(embedding_dim)]
    result = run(PHASE_4, *flags)
    assert result.returncode == 0, result.stderr
    reduced = SentenceTransformer(str(tmp_path / "checkpoints/teacher"), device="cpu")
    prompts = {"query": reduced.prompts["query"], "document": reduced.prompts["document"]}
    if "prompts" in options:
        assert prompts == {"query": "query: ", "document": "passage: "}
        assert "not used: clustering" in result.stderr
    original = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}).float()
    for split in ("train", "validation"):
        table = pq.read_table(tmp_path / "data/distil" / f"{split}-00000-of-00001.parquet")
        for kind, embed in (("query", reduced.encode_query), ("document", reduced.encode_document)):
            chosen = table.filter(pa.array([other == kind for other in table["kind"].to_pylist()]))
            labels = np.array(chosen["label"].to_pylist(), np.float32)
            vectors = embed(chosen["sentence"].to_pylist())
            assert_same(labels, vectors)
            given = original.encode(chosen["sentence"].to_pylist(), prompt=prompts[kind])
            if embedding_dim < given.shape[1]:
                given = given @ reduced[-2].linear.weight.detach().numpy()[:, : given.shape[1]].T
            assert_same(vectors, unit(given))


def drop_weights(folder, part):
    weights = load_file(folder / "model.safetensors")
    left = {name: value for name, value in weights.items() if part not in name}
    assert len(left) < len(weights)
    save_file(left, folder / "model.safetensors", {"format": "pt"})


def test_a_pooler_that_the_folder_lacks_is_not_needed(tmp_path, tokenizers):
    # snowflake-arctic-embed-m-v1.5: BertModel's pooler is not in the file, and no vector depends on it.
    folder = write_teacher(tmp_path / "teacher", tokenizers, pooling="cls", prompts={"query": "find: "})
    drop_weights(folder, "pooler.")
    check_labels(folder, NO_PROMPTS | {"query": "find: "})


def test_weights_that_the_folder_lacks_are_refused(tmp_path, tokenizers, run):
    # jina-embeddings-v2-base-en calls itself a BERT, but its weights are those of another architecture's layers.
    drop_weights(write_teacher(tmp_path / "own", tokenizers), "intermediate.")
    result = run(PHASE_4, "--teacher_name_or_path", "own", "--embedding_dim", str(NARROW))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: --teacher_name_or_path own")


def test_the_side_that_the_tokenizer_cuts(tmp_path, tokenizers):
    # Tokenizers of some decoders keep a long text's end.
    folder = write_teacher(tmp_path / "teacher", tokenizers)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"truncation_side": "left"})
    check_labels(folder)


def test_a_slow_tokenizer_is_one_line(tmp_path, tokenizers, run):
    # vietnamese-bi-encoder and others on PhoBERT: a vocabulary and merges that only Python reads.
    folder = write_teacher(tmp_path / "own", tokenizers, "xlm-roberta")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("the 9\ncat 8\nsat 7\n")
    (folder / "bpe.codes").write_text("t h 9\nth e</w> 9\n")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PhobertTokenizer"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"tokenizer_class": "PhobertTokenizer"})
    result = run(PHASE_4, "--teacher_name_or_path", "own", "--embedding_dim", str(NARROW))
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == "error: tokenizer own: expected a fast tokenizer (tokenizer.json)"
    assert not (tmp_path / "checkpoints/teacher").exists()


CODE = """
from pathlib import Path

from transformers import BertConfig, BertModel

Path({marker!r}).touch()


class OwnConfig(BertConfig):
    model_type = "own_bert"


class OwnModel(BertModel):
    config_class = OwnConfig
"""


def test_code_of_the_teachers_own_runs_only_when_allowed(tmp_path, tokenizers, run, monkeypatch):
    # snowflake-arctic-embed-m-v2.0: an architecture that transformers lacks, its code in the folder.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, marker = write_teacher(tmp_path / "own", tokenizers), tmp_path / "was_run"
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    own = {"model_type": "own_bert", "architectures": ["OwnModel"], "auto_map": code}
    write_json(folder / "config.json", config | own)

    flags = ["--teacher_name_or_path", "own", "--embedding_dim", str(NARROW)]
    refused = run(PHASE_4, *flags)
    assert refused.returncode == 2, refused.stderr
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("error: --teacher_name_or_path own: brings code of its own, which is not run")
    assert "--trust_remote_code" in line
    assert not marker.exists()

    allowed = run(PHASE_4, *flags, "--trust_remote_code")
    assert allowed.returncode == 0, allowed.stderr
    assert marker.exists()
    reduced = load_sentence_transformer("", str(tmp_path / "checkpoints/teacher"), trust_remote_code=True)
    table = pq.read_table(tmp_path / "data/distil/train-00000-of-00001.parquet")
    assert_same(np.array(table["label"].to_pylist(), np.float32), reduced.encode(table["sentence"].to_pylist()))


# What phases 3 and 5 are given in each case: a checkpoint of masked language modelling in the form of a repository
# (ettin-encoder-32m), one of phase 2 or 3 stored in half precision, or an embedding model with the first token as its
# vector, whose encoder has no head (granite-embedding-small-english-r2).
STUDENTS = ["ettin-encoder-32m", "float16", "granite-embedding-small-english-r2"]
TRAINING = [
    *("--model_name_or_path", "student", "--max_seq_length", "48", "--tokens_per_batch", "256", "--max_steps", "3"),
    *("--output_dir", "trained", "--report_to", "none"),
]


def write_student(folder, tokenizers, form):
    if form == "granite-embedding-small-english-r2":
        write_teacher(folder, tokenizers, "modernbert", "bfloat16", pooling="cls")
        return
    shutil.copytree(tokenizers / "modernbert", folder)
    dtype = "float16" if form == "float16" else "float32"
    tiny_modernbert(folder, transformers.AutoTokenizer.from_pretrained(folder), hidden_size=WIDTH, num_hidden_layers=3)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: w.to(DTYPES[dtype]) for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    if form == "ettin-encoder-32m":  # transformers 4 wrote each layer's kind and rotation as single numbers
        for name in ("layer_types", "rope_parameters"):
            config.pop(name, None)
        config |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
        config |= {"position_embedding_type": "sans_pos", "reference_compile": False}
    write_json(folder / "config.json", config | {"torch_dtype": dtype})


@pytest.mark.parametrize("form", STUDENTS)
def test_students_of_phase_5(tmp_path, tokenizers, run, form):
    write_student(tmp_path / "student", tokenizers, form)
    write_teacher(tmp_path / "own", tokenizers)
    labelled = run(*(PHASE_4, "--teacher_name_or_path", "own", "--embedding_dim", str(WIDTH)))
    assert labelled.returncode == 0, labelled.stderr
    result = run(PHASE_5, *TRAINING, "--eval_datasets", "--eval_steps", "3", "--save_steps", "3")
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "trained/run.json").read_text())
    assert record["heldout_similarity"] > record["alignment_similarity"]["before"]
    student = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    assert {value.dtype for value in student.state_dict().values()} == {torch.float32}
    vectors = student.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    labels = pq.read_table(tmp_path / "data/distil/validation-00000-of-00001.parquet")
    cosines = (student.encode(labels["sentence"].to_pylist()) * np.array(labels["label"].to_pylist())).sum(1)
    # The record's is in the precision of the training, which is bf16 where the CPU has it.
    assert cosines.mean() == pytest.approx(record["heldout_similarity"], abs=5e-3)


@pytest.mark.parametrize("form", STUDENTS[:2])
def test_students_of_phase_3(tmp_path, tokenizers, run, form):
    write_student(tmp_path / "student", tokenizers, form)
    result = run(PHASE_3, *TRAINING, "--eval_steps", "3")
    assert result.returncode == 0, result.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "trained"))
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name].float(), after[name])]
    assert len(moved) > len(before) // 2


def test_features_are_the_teachers_own_vectors(tmp_path, tokenizers):
    write_teacher(tmp_path / "teacher", tokenizers)
    teacher = SentenceTransformer(str(tmp_path / "teacher"), device="cpu")
    words = [word for word in teacher.tokenizer.get_vocab() if word.isalpha() and word.islower()][:20]
    words = [word for word in words if len(teacher.tokenizer(word)["input_ids"]) == 3]
    assert words
    features = token_features(teacher, len(teacher.tokenizer), batch_size=64)
    ids = [teacher.tokenizer(word)["input_ids"][1] for word in words]
    np.testing.assert_allclose(features[ids, :WIDTH], teacher.encode(words), atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(features[:, WIDTH:], axis=1), 1, atol=1e-5)


def test_phase_5_starts_nearer_to_its_labels(tmp_path, tokenizers, run):
    shutil.copytree(tokenizers / "modernbert", tmp_path / "student")
    tiny_modernbert(
        tmp_path / "student", transformers.AutoTokenizer.from_pretrained(tmp_path / "student"), hidden_size=WIDTH
    )
    write_teacher(tmp_path / "own", tokenizers, "modernbert")
    labelled = run(*(PHASE_4, "--teacher_name_or_path", "own", "--embedding_dim", str(WIDTH)))
    assert labelled.returncode == 0, labelled.stderr
    result = run(PHASE_5, *TRAINING, "--start", "static", "--eval_datasets")
    assert result.returncode == 0, result.stderr
    cosines = json.loads((tmp_path / "trained/run.json").read_text())["alignment_similarity"]
    assert cosines["after"] > cosines["before"] + 0.3


def test_a_token_is_in_no_file_and_no_line(tmp_path, tokenizers, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    write_student(tmp_path / "student", tokenizers, "float32")
    result = run(PHASE_3, *TRAINING, "--save_steps", "3", "--eval_steps", "3", "--hub_token", "hf_secret")
    assert result.returncode == 0, result.stderr
    assert "hf_secret" not in result.stdout + result.stderr
    assert (tmp_path / "trained/checkpoint-3/training_args.bin").exists()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"hf_secret" not in file.read_bytes(), file
