"""Tiny models and tokenizers, and ways to run a script, that several tests use."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from modernbert_small.run.script import run_script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = (
    "mlm/create_dataset.py",
    "mlm/init_model_mlm.py",
    "mlm/pre_train.py",
    "create_distil_dataset.py",
    "distil_train.py",
)
SPECIAL_TOKENS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
SENTENCES = [
    "The cat sat on the mat, and the dog lay beside it.",
    "A model is a map: smaller than the land, and useful because of it.",
    "Water boils at 100 degrees; in the mountains it boils sooner.",
    "She reads the paper every morning before the train leaves.",
]


def tiny_tokenizer(folder: Path, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like ModernBERT's, trained on a few sentences and saved to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ids
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    return fast


def tiny_modernbert(folder: Path, tokenizer: PreTrainedTokenizerFast, **config) -> ModernBertForMaskedLM:
    """A tiny ModernBERT with random weights for the tokenizer, saved to `folder`."""
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 128,
        "local_attention": 16,
        "initializer_range": 0.3,
    }
    special |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=len(tokenizer), **special, **(sizes | config)))
    model.save_pretrained(folder)
    return model.eval()


def tiny_sentence_transformer(
    folder: Path, architecture: str, max_seq_length: int = 64, width: int = 24
) -> SentenceTransformer:
    """A tiny teacher with random weights and mean pooling, saved to `folder / "teacher"`."""
    tokenizer = tiny_tokenizer(folder / "encoder")
    if architecture == "modernbert":
        tiny_modernbert(folder / "encoder", tokenizer, hidden_size=width)
    else:
        torch.manual_seed(0)
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = BertConfig(vocab_size=len(tokenizer), hidden_size=width, initializer_range=0.3, **sizes)
        BertModel(config).save_pretrained(folder / "encoder")
    transformer = Transformer(str(folder / "encoder"), max_seq_length=max_seq_length)
    model = SentenceTransformer(modules=[transformer, Pooling(width, "mean")], device="cpu")
    model.save_pretrained(str(folder / "teacher"))
    return model


def load_script(path: str) -> ModuleType:
    """A script of the project as a module, so that a test can call its `main` without a new interpreter."""
    name = path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run_in_process(script: str, folder: Path, capsys: Any, *flags: str) -> subprocess.CompletedProcess:
    """Run a script as the shell would, but in this process, which saves the seconds that imports take."""
    module, argv, where = load_script(script), sys.argv, Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.getLogger().handlers, kept = [], logging.getLogger().handlers
    capsys.readouterr()
    os.chdir(folder)
    sys.argv = [script, *flags]
    try:
        run_script(module.main)
    except SystemExit as stop:
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, stop.code, out, err)
    finally:
        sys.argv = argv
        os.chdir(where)
        logging.getLogger().handlers = kept
        for number, handler in handlers.items():
            signal.signal(number, handler)
