"""What is saved has the names that older releases know, and the running releases read them as before.

tests/soak_releases.py loads such folders in older releases.
"""

import json

import numpy as np
import pytest
import torch
from helpers import SENTENCES, tiny_modernbert, tiny_sentence_transformer, tiny_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, ModernBertForMaskedLM

from modernbert_small.label.teacher import with_projection
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_pooled, pooling_of
from modernbert_small.run.saving import (
    global_attention_period,
    older_encoder_settings,
    save_embedding_model,
    save_encoder,
)

ROPE = {
    "full_attention": {"rope_theta": 500.0, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 30.0, "rope_type": "default"},
}


def read(*parts):
    return json.loads(parts[0].joinpath(*parts[1:]).read_text())


@pytest.fixture
def encoder(tmp_path):
    """A ModernBERT none of whose settings is a default, and its folder."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    odd = {"rope_parameters": ROPE, "layer_types": kinds, "num_hidden_layers": 3, "norm_eps": 1e-2}
    return tiny_modernbert(tmp_path / "mlm", tiny_tokenizer(tmp_path / "mlm"), **odd), tmp_path / "mlm"


def test_an_embedding_model_has_both_names(encoder, tmp_path):
    model = load_pooled("model", str(encoder[1]), 64).to("cpu")
    save_embedding_model(model, tmp_path / "out")
    types = [module["type"] for module in read(tmp_path, "out/modules.json")]
    assert types == [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
    config = read(tmp_path, "out/config.json")
    older = {name: config[name] for name in ("global_rope_theta", "local_rope_theta", "layer_norm_eps")}
    assert older == {"global_rope_theta": 500.0, "local_rope_theta": 30.0, "layer_norm_eps": 1e-2}
    assert config["global_attn_every_n_layers"] == 2
    assert config["rope_parameters"] == ROPE
    assert read(tmp_path, "out/sentence_bert_config.json") == {"max_seq_length": 64, "do_lower_case": False}
    pooling = read(tmp_path, "out/1_Pooling/config.json")
    assert pooling.pop("word_embedding_dimension") == 16
    assert [name for name, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]
    tokenizer = read(tmp_path, "out/tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert again.max_seq_length == 64
    np.testing.assert_array_equal(again.encode(SENTENCES), model.encode(SENTENCES))


def test_saved_twice_it_is_the_same(encoder, tmp_path):
    model = load_pooled("model", str(encoder[1]), 64).to("cpu")
    save_embedding_model(model, tmp_path / "out")
    save_embedding_model(SentenceTransformer(str(tmp_path / "out"), device="cpu"), tmp_path / "again")
    for name in ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert read(tmp_path, "again", name) == read(tmp_path, "out", name), name


def test_an_encoder_loads_as_before(encoder, tmp_path):
    model, folder = encoder
    save_encoder(model, AutoTokenizer.from_pretrained(folder), tmp_path / "out")
    assert read(tmp_path, "out/config.json")["local_rope_theta"] == 30.0
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(SENTENCES[0], return_tensors="pt")
    assert set(ids) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        again = ModernBertForMaskedLM.from_pretrained(tmp_path / "out")(**ids).logits
        torch.testing.assert_close(again, model(**ids).logits)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_that_pools_says_how(encoder, tmp_path, pooling):
    model, folder = encoder
    assert pooling_of("model", str(folder)) is None
    save_encoder(model, AutoTokenizer.from_pretrained(folder), tmp_path / "out", pooling)
    assert pooling_of("model", str(tmp_path / "out")) == pooling
    loaded = load_pooled("model", str(tmp_path / "out"), 64, "cpu")
    other = load_pooled("model", str(tmp_path / "out"), 64, "cpu", {"cls": "mean", "mean": "cls"}[pooling])
    assert (loaded[1].pooling_mode, other[1].pooling_mode) == (pooling, {"cls": "mean", "mean": "cls"}[pooling])
    stock = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    vectors = stock.encode(SENTENCES, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, loaded.encode(SENTENCES), atol=1e-6)


def test_an_encoder_that_pools_otherwise_is_refused(encoder, tmp_path):
    model, folder = encoder
    save_encoder(model, AutoTokenizer.from_pretrained(folder), tmp_path / "out", "lasttoken")
    with pytest.raises(UserError, match="pools by lasttoken, expected cls or mean"):
        pooling_of("model", str(tmp_path / "out"))


def test_modules_behind_a_router_are_renamed_too(tmp_path):
    student = tiny_sentence_transformer(tmp_path / "a", "modernbert", width=16)
    teacher = with_projection(tiny_sentence_transformer(tmp_path / "b", "bert"), np.eye(24)[:, :16]).to("cpu")
    router = Router.for_query_document(list(student), list(teacher))
    model = SentenceTransformer(modules=[router], device="cpu")
    save_embedding_model(model, tmp_path / "out")
    kinds = read(tmp_path, "out/router_config.json")["types"]
    assert kinds["query_0_Transformer"] == "sentence_transformers.models.Transformer"
    assert kinds["document_2_Dense"] == "sentence_transformers.models.Dense"
    assert "module_input_name" not in read(tmp_path, "out/document_2_Dense/config.json")
    assert "global_rope_theta" in read(tmp_path, "out/query_0_Transformer/config.json")
    assert read(tmp_path, "out/document_0_Transformer/sentence_bert_config.json")["max_seq_length"] == 64
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_array_equal(again.encode_query(SENTENCES), student.encode(SENTENCES))
    np.testing.assert_array_equal(again.encode_document(SENTENCES), teacher.encode(SENTENCES))


@pytest.mark.parametrize("modes", [("cls", "mean"), ("mean", "cls")])
def test_several_ways_to_pool_keep_their_order(tmp_path, modes):
    model = tiny_sentence_transformer(tmp_path, "bert")
    two = SentenceTransformer(modules=[model[0], Pooling(24, modes)], device="cpu")
    save_embedding_model(two, tmp_path / "out")
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_array_equal(again.encode(SENTENCES), two.encode(SENTENCES))


@pytest.mark.parametrize(
    ("layers", "period"),
    [("f", 1), ("fff", 1), ("fss", 3), ("fsfs", 2), ("fssfssf", 3), ("sfs", None), ("fsff", None)],
)
def test_which_layers_are_global(layers, period):
    names = {"f": "full_attention", "s": "sliding_attention"}
    assert global_attention_period([names[layer] for layer in layers]) == period


def test_what_has_no_older_name_is_null():
    scaled = ROPE | {"full_attention": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}}
    kinds = ["sliding_attention", "full_attention"]
    config = {"model_type": "modernbert", "norm_eps": 1e-5, "rope_parameters": scaled, "layer_types": kinds}
    older = older_encoder_settings(config)
    assert older["global_rope_theta"] is None
    assert older["global_attn_every_n_layers"] is None
    assert older["local_rope_theta"] == 30.0


def test_other_encoders():
    assert older_encoder_settings({"model_type": "bert"}) == {}
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    assert older_encoder_settings({"model_type": "qwen3", "rope_parameters": rope}) == {"rope_theta": 1e6}
