"""Saving models in a form that older releases and other programs can load too.

transformers 5 and sentence-transformers 6 have new names for many settings. Older releases, servers and converters know
only the names from before. Where they miss one, they stop, or take a default in silence. The new releases still read
the older names. So what is saved here has both names, or the older one alone where older releases stop at the new one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modernbert_small.run.loading import PoolingMode
from modernbert_small.run.records import write_json

Json = dict[str, Any]

# The ways to pool, as sentence-transformers names them now, and the ends of the names that it had until version 5.
_POOLING = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
# What sentence-transformers 6 takes by default, writes all the same, and version 5 stops at.
_DEFAULTS: Json = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_DENSE_DEFAULTS: Json = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
_NO_LIMIT = 10**9  # a tokenizer without a longest input says 1e30


def save_encoder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, pooling: PoolingMode | None = None
) -> None:
    """Write a model of transformers and its tokenizer; with `pooling`, also the modules of a SentenceTransformer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _rewrite_encoder(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        Pooling(model.config.hidden_size, pooling).save(str(folder / "1_Pooling"))
        _rewrite_pooling(folder / "1_Pooling")
        parts = enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
        modules = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in parts
        ]
        write_json(folder / "modules.json", modules)


def save_embedding_model(model: SentenceTransformer, folder: Path) -> None:
    """Write a SentenceTransformer, without a card."""
    model.save_pretrained(str(folder), create_model_card=False)
    rewrite = {"Transformer": _rewrite_text_encoder, "Pooling": _rewrite_pooling, "Dense": _rewrite_dense}
    for part, kind in _parts(folder):
        if kind in rewrite:
            rewrite[kind](part)


def _parts(folder: Path) -> Iterator[tuple[Path, str]]:
    """The folder and the class of each module, those behind a Router included; gives all classes their older names."""
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    found = [(folder / module["path"], module) for module in modules]
    for part, module in found:
        kind = module["type"] = _older_type(module["type"])
        yield part, kind.rpartition(".")[2]
        if kind.endswith(".Router"):
            router = json.loads((part / "router_config.json").read_text(encoding="utf-8"))
            router["types"] = {name: _older_type(one) for name, one in router["types"].items()}
            router["parameters"] = _without_defaults(router["parameters"], {"route_mappings": {}})
            write_json(part / "router_config.json", router)
            yield from ((part / name, one.rpartition(".")[2]) for name, one in router["types"].items())
    write_json(folder / "modules.json", modules)


def _older_type(name: str) -> str:
    """The name of a module's class until sentence-transformers 5; a class of somebody else keeps its name."""
    is_theirs = name.startswith("sentence_transformers.")
    return f"sentence_transformers.models.{name.rpartition('.')[2]}" if is_theirs else name


def _rewrite(file: Path, change: Callable[[Json], Json]) -> Json:
    """Change a JSON file; returns what it holds now, nothing if there is no such file."""
    if not file.exists():
        return {}
    changed = change(json.loads(file.read_text(encoding="utf-8")))
    write_json(file, changed)
    return changed


def _without_defaults(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Json:
    """A configuration without the settings that say what holds anyway; all of it if one of them says something else."""
    if any(config.get(name, value) != value for name, value in defaults.items()):
        return dict(config)
    return {name: value for name, value in config.items() if name not in defaults}


def _rewrite_encoder(folder: Path) -> Json:
    """Rewrite config.json and tokenizer_config.json; returns the latter."""
    _rewrite(folder / "config.json", lambda config: config | older_encoder_settings(config))
    return _rewrite(folder / "tokenizer_config.json", _older_tokenizer)


def _rewrite_text_encoder(folder: Path) -> None:
    limit = _rewrite_encoder(folder).get("model_max_length")
    older = {"max_seq_length": limit if limit and limit < _NO_LIMIT else None, "do_lower_case": False}
    _rewrite(folder / "sentence_bert_config.json", lambda config: older | _without_defaults(config, _DEFAULTS))


def _rewrite_dense(folder: Path) -> None:
    _rewrite(folder / "config.json", lambda config: _without_defaults(config, _DENSE_DEFAULTS))


def _rewrite_pooling(folder: Path) -> None:
    _rewrite(folder / "config.json", _older_pooling)


def _older_pooling(config: Json) -> Json:
    """Pooling's settings with a boolean for each way to pool, which have a fixed order."""
    modes = config["pooling_mode"]
    modes = [modes] if isinstance(modes, str) else modes
    if modes != [mode for mode in _POOLING if mode in modes]:
        return config
    kept = {name: value for name, value in config.items() if name not in ("pooling_mode", "embedding_dimension")}
    booleans = {f"pooling_mode_{older}": mode in modes for mode, older in _POOLING.items()}
    return {"word_embedding_dimension": config["embedding_dimension"]} | booleans | kept


def _older_tokenizer(config: Json) -> Json:
    """A tokenizer's settings; transformers 4 does not know the class of a tokenizer that is all in tokenizer.json."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        names = config.get("model_input_names", ["input_ids", "attention_mask"])  # transformers 4 adds token types
        config = config | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names}
    if isinstance(config.get("extra_special_tokens"), list):
        config = config | {"additional_special_tokens": config["extra_special_tokens"]}
        del config["extra_special_tokens"]  # transformers 4 expects a mapping
    return config


def older_encoder_settings(config: Mapping[str, Any]) -> Json:
    """The settings of an encoder under the names that transformers 4, servers and converters know.

    What they have no name for becomes null. They stop at it, where without it they would compute other vectors.

    Args:
        config: config.json.
    """
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") != "modernbert":
        return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return {
        "global_rope_theta": _plain_theta(rope["full_attention"]),
        "local_rope_theta": _plain_theta(rope["sliding_attention"]),
        "global_attn_every_n_layers": global_attention_period(config["layer_types"]),
        "layer_norm_eps": config["norm_eps"],
    }


def _plain_theta(rope: Mapping[str, Any]) -> float | None:
    """RoPE's theta, None if RoPE is scaled."""
    return rope["rope_theta"] if rope.get("rope_type", "default") == "default" else None


def global_attention_period(layer_types: Sequence[str]) -> int | None:
    """The n of which every n-th layer, from the first on, has full attention; None if there is none.

    Args:
        layer_types: `full_attention` or `sliding_attention`, by layer.
    """
    full = [kind == "full_attention" for kind in layer_types]
    periods = range(1, len(full) + 1)
    return next((n for n in periods if full == [layer % n == 0 for layer in range(len(full))]), None)
