"""Training that is interrupted and goes on ends where undisturbed training ends."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import SENTENCES, load_script, tiny_modernbert, tiny_tokenizer
from safetensors.torch import load_file
from transformers import TrainerCallback

from modernbert_small.checkpoints import last_whole_checkpoint
from modernbert_small.settings import UserError, parse_settings

SCRIPT = "mlm/pre_train.py"


class KilledError(Exception):
    """Stands for a SIGKILL."""


@pytest.fixture
def phase3(tmp_path, monkeypatch):
    """Calls phase 3's main on a tiny corpus, optionally ended after some steps."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny_modernbert(tmp_path / "init", tiny_tokenizer(tmp_path / "init"))
    texts = [" ".join(SENTENCES[i % 4].split()[: 2 + i % 9]) + f" {i}" for i in range(80)]
    (tmp_path / "corpus").mkdir()
    for split, rows in (("train", texts[:60]), ("validation", texts[60:])):
        pq.write_table(pa.table({"text": rows}), tmp_path / "corpus" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    module = load_script(SCRIPT)

    def call(output, stop_after=None, *flags):
        defaults = ["--model_name_or_path", "init", "--train_file", "corpus", "--max_seq_length", "32"]
        defaults += ["--tokens_per_batch", "128", "--num_train_epochs", "2", "--save_steps", "4", "--report_to", "none"]
        defaults += ["--eval_steps", "1000", "--learning_rate", "1e-2"]

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop_after:
                    raise KilledError

        argv = [*defaults, "--output_dir", output, *flags]
        monkeypatch.setattr("sys.argv", [SCRIPT, *argv])
        monkeypatch.setattr(
            module,
            "Perplexity",
            lambda original=module.Perplexity: Stop() if stop_after else original(),
        )
        try:
            module.main()
        finally:
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)
        return tmp_path / output

    return call


def test_killed_and_resumed_equals_undisturbed(phase3, tmp_path):
    whole = phase3("whole")
    with pytest.raises(KilledError):
        phase3("stopped", 7)
    assert not (tmp_path / "stopped").exists()
    partial = tmp_path / "stopped.partial"
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-4")
    shutil.copytree(partial / "checkpoint-4", partial / "checkpoint-6")
    (partial / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1')  # killed while it was written
    stopped = phase3("stopped")

    a, b = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    for name in a:
        np.testing.assert_allclose(a[name].float(), b[name].float(), atol=1e-4, err_msg=name)
    records = [json.loads((folder / "run.json").read_text()) for folder in (whole, stopped)]
    assert records[0]["steps"] == records[1]["steps"]
    assert records[0]["heldout_mlm_loss"] == pytest.approx(records[1]["heldout_mlm_loss"], abs=1e-4)
    assert records[0]["heldout_mlm_loss"] < np.log(400)  # better than chance over the vocabulary
    assert records[0]["padding_share"] == 0
    assert records[0]["train_tokens_per_second"] > 0
    assert not partial.exists()


def test_stable_adamw_and_the_trapezoidal_schedule(phase3):
    flags = ["--optim", "stable_adamw", "--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "0.2"]
    record = json.loads((phase3("out", None, *flags, "--logging_steps", "1") / "run.json").read_text())
    rates = [entry["learning_rate"] for entry in record["history"] if "learning_rate" in entry]
    steps, warmup, decay = record["steps"], math.ceil(0.2 * record["steps"]), math.ceil(0.1 * record["steps"])
    assert rates[:warmup] == pytest.approx([1e-2 * step / warmup for step in range(warmup)])
    assert rates[warmup : steps - decay] == pytest.approx([1e-2] * (steps - decay - warmup))
    assert 0 < rates[-1] <= 1e-2
    assert record["heldout_mlm_loss"] < np.log(400)


def test_nothing_pickled_lies_beside_the_weights(phase3):
    out = phase3("out")
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_a_model_with_nan_is_refused(phase3, tmp_path):
    from transformers import ModernBertForMaskedLM

    model = ModernBertForMaskedLM.from_pretrained(tmp_path / "init")
    model.head.dense.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "init")
    with pytest.raises(UserError, match=r"init: weight head.dense.weight holds NaN"):
        phase3("out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokens_per_batch", "100"], "tokens_per_batch: 100 is less than max_seq_length 1024"),
        (["--per_device_train_batch_size", "4"], "batches are counted in tokens here; use tokens_per_batch"),
        (["--learning_rate", "0"], "learning_rate: 0.0, expected more than 0"),
        (["--mlm_probability", "1.5"], "mlm_probability: 1.5, expected a share between 0 and 1"),
        (["--attn_implementation", "magic"], "attn_implementation: magic, expected auto"),
        (["--attn_implementation", "varlen"], "varlen needs a CUDA device"),
        (
            ["--metric_for_best_model", "eval_lsos", "--load_best_model_at_end", "true"],
            "metric_for_best_model: lsos, expected loss",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="varlen is possible")
def test_impossible_settings_are_named_before_anything_loads(flags, said):
    with pytest.raises(UserError) as error:
        parse_settings(load_script(SCRIPT).PreTrainArguments, "pre_train", None, flags)
    assert said in str(error.value)


def test_all_problems_are_said_at_once():
    flags = ["--tokens_per_batch", "100", "--learning_rate", "-1", "--mlm_probability", "0"]
    with pytest.raises(UserError, match=r"tokens_per_batch.*; learning_rate.*; mlm_probability"):
        parse_settings(load_script(SCRIPT).PreTrainArguments, "pre_train", None, flags)
