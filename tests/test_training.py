"""Training that is interrupted and resumed ends with the weights of undisturbed training; its settings are checked."""

import json
import logging
import math
import os
import re
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import SENTENCES, load_script, tiny_modernbert, tiny_tokenizer
from safetensors.torch import load_file
from test_durable import WAYS, spoil
from transformers import Trainer, TrainerCallback, TrainerState

from modernbert_small.packed import trainer as training
from modernbert_small.packed.batches import PackedSampler
from modernbert_small.packed.checkpoints import last_whole_checkpoint
from modernbert_small.packed.tokens import tokenize_split
from modernbert_small.pretrain import loss
from modernbert_small.run.errors import Terminated, UserError, raise_stop
from modernbert_small.settings.parse import parse_settings

SCRIPT = "mlm/pre_train.py"


class KilledError(Exception):
    """Stands for a SIGKILL."""


@pytest.fixture
def phase3(tmp_path, monkeypatch):
    """Calls phase 3's main on a tiny corpus, optionally ended after some steps or with a callback of the test's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny_modernbert(tmp_path / "init", tiny_tokenizer(tmp_path / "init"))
    texts = [" ".join(SENTENCES[i % 4].split()[: 2 + i % 9]) + f" {i}" for i in range(80)]
    (tmp_path / "corpus").mkdir()
    for split, rows in (("train", texts[:60]), ("validation", texts[60:])):
        pq.write_table(pa.table({"text": rows}), tmp_path / "corpus" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    module = load_script(SCRIPT)

    def call(output, stop_after=None, *flags, callback=None):
        defaults = ["--model_name_or_path", "init", "--train_file", "corpus", "--max_seq_length", "32"]
        defaults += ["--tokens_per_batch", "128", "--num_train_epochs", "2", "--save_steps", "4", "--report_to", "none"]
        defaults += ["--eval_steps", "1000", "--learning_rate", "1e-2"]

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop_after:
                    raise KilledError

        argv = [*defaults, "--output_dir", output, *flags]
        monkeypatch.setattr("sys.argv", [SCRIPT, *argv])
        added, trainer = [callback or Stop()], module.MaskedLMTrainer
        monkeypatch.setattr(module, "MaskedLMTrainer", lambda **given: trainer(**given, callbacks=added))
        try:
            module.main()
        finally:
            monkeypatch.undo()
            monkeypatch.chdir(tmp_path)
        return tmp_path / output

    return call


def on(event, action):
    """A callback that does one thing."""
    return type("On", (TrainerCallback,), {event: lambda self, args, state, control, **others: action(state, others)})()


def assert_equal_weights(*folders):
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    for name in first:
        np.testing.assert_allclose(first[name].float(), second[name].float(), atol=1e-4, err_msg=name)


def kill(*_arguments, **_named):
    raise KilledError


def test_killed_and_resumed_equals_undisturbed(phase3, tmp_path):
    whole = phase3("whole")
    with pytest.raises(KilledError):
        phase3("stopped", 7)
    assert not (tmp_path / "stopped").exists()
    partial = tmp_path / "stopped.partial"
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-4")
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.rmtree(partial / "checkpoint-6", ignore_errors=True)
        shutil.copytree(partial / "checkpoint-4", partial / "checkpoint-6")
        os.truncate(partial / "checkpoint-6" / name, (partial / "checkpoint-6" / name).stat().st_size // 2)
        assert last_whole_checkpoint(partial) == str(partial / "checkpoint-4"), name
    stopped = phase3("stopped")

    assert_equal_weights(whole, stopped)
    records = [json.loads((folder / "run.json").read_text()) for folder in (whole, stopped)]
    assert records[0]["steps"] == records[1]["steps"]
    assert records[0]["heldout_mlm_loss"] == pytest.approx(records[1]["heldout_mlm_loss"], abs=1e-4)
    assert records[0]["heldout_mlm_loss"] < np.log(400)  # better than chance over the vocabulary
    assert records[0]["padding_share"] == 0
    assert records[0]["train_tokens_per_second"] > 0
    assert not partial.exists()


def test_every_damaged_file_makes_the_checkpoint_before_be_used(phase3, tmp_path, caplog):
    whole = phase3("whole")
    with pytest.raises(KilledError):
        phase3("stopped", 10)
    partial = tmp_path / "stopped.partial"
    kept = tmp_path / "kept"
    shutil.copytree(partial / "checkpoint-8", kept)
    names = sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"} <= set(names)
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-8")
    for name in names:
        for how in WAYS:
            shutil.rmtree(partial / "checkpoint-8")
            shutil.copytree(kept, partial / "checkpoint-8")
            caplog.clear()
            spoil(partial / "checkpoint-8" / name, how)
            # Without a manifest it is a checkpoint of before there were any.
            expected = 8 if (name, how) == ("manifest.json", "delete") else 4
            assert last_whole_checkpoint(partial) == str(partial / f"checkpoint-{expected}"), (name, how)
            stem = "random numbers" if (name, how) == ("rng_state.pth", "delete") else name
            assert len([message for message in caplog.messages if stem in message]) == 1, (name, how)
    shutil.rmtree(partial / "checkpoint-8")
    shutil.copytree(kept, partial / "checkpoint-8")
    (partial / "checkpoint-8" / "optimizer.pt").unlink()
    assert_equal_weights(whole, phase3("stopped"))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_before_manifests_needs_all_states(phase3, tmp_path, name):
    with pytest.raises(KilledError):
        phase3("stopped", 10)
    partial = tmp_path / "stopped.partial"
    for checkpoint in partial.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-8")
    (partial / "checkpoint-8" / name).unlink()
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-4")


def test_the_checkpoint_that_was_taken_is_recorded(phase3, tmp_path):
    """Not the newest one, which is damaged."""
    with pytest.raises(KilledError):
        phase3("stopped", 10)
    spoil(tmp_path / "stopped.partial" / "checkpoint-8" / "model.safetensors", "truncate")
    sessions = json.loads((phase3("stopped") / "run.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [None, 4]


def test_the_held_out_losses_are_compared_once(phase3, monkeypatch, caplog):
    compared = []
    monkeypatch.setattr(training, "note_if_worse", lambda *losses, **options: compared.append(losses) or {})
    record = json.loads((phase3("out", None, "--max_steps", "8", "--eval_steps", "4") / "run.json").read_text())
    losses = [entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry]
    assert compared == [("held-out loss", losses[0], losses[1])]


def test_with_all_checkpoints_damaged_training_begins_anew(phase3, tmp_path):
    whole = phase3("whole")
    with pytest.raises(KilledError):
        phase3("stopped", 10)
    for checkpoint in (tmp_path / "stopped.partial").glob("checkpoint-*"):
        spoil(checkpoint / "model.safetensors", "zero")
    began = []
    begin = on("on_train_begin", lambda state, others: began.append(state.global_step))
    assert_equal_weights(whole, phase3("stopped", callback=begin))
    assert began == [0]


def test_a_damaged_checkpoint_of_a_later_step_does_not_displace_a_whole_one(phase3, tmp_path):
    """With one checkpoint to keep, the damaged one would be kept as the newest."""
    flags = ["--save_total_limit", "1", "--save_steps", "3"]
    with pytest.raises(KilledError):
        phase3("stopped", 10, *flags)
    partial = tmp_path / "stopped.partial"
    shutil.copytree(partial / "checkpoint-9", partial / "checkpoint-11")
    spoil(partial / "checkpoint-9" / "optimizer.pt", "zero")
    spoil(partial / "checkpoint-11" / "optimizer.pt", "zero")
    with pytest.raises(KilledError):
        phase3("stopped", 4, *flags)
    assert [path.name for path in partial.glob("checkpoint-*")] == ["checkpoint-3"]
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-3")


@pytest.mark.parametrize("how", WAYS)
def test_a_damaged_best_checkpoint_is_not_what_training_ends_with(phase3, tmp_path, caplog, how):
    worse = on("on_evaluate", lambda state, others: others["metrics"].update(eval_loss=float(state.global_step)))
    worse.on_step_end = lambda args, state, control, **others: kill() if state.global_step == killed else None
    flags = ["--eval_steps", "4", "--load_best_model_at_end", "true", "--metric_for_best_model", "loss"]
    killed = 0
    whole = phase3("whole", None, *flags, callback=worse)
    killed = 10
    with pytest.raises(KilledError):
        phase3("stopped", None, *flags, callback=worse)
    killed = 0
    spoil(tmp_path / "stopped.partial" / "checkpoint-4" / "model.safetensors", how)
    assert_equal_weights(whole, phase3("stopped", None, *flags, callback=worse))
    assert "checkpoint-8 is not whole and is not used: checkpoint-4, the best so far: model.safetensors" in caplog.text


def test_killed_at_every_point_of_a_checkpoint(phase3, tmp_path, monkeypatch):
    whole = phase3("whole")

    def in_step_8(original):
        def replaced(self, *args, **named):
            return kill() if getattr(self, "state", self).global_step == 8 else original(self, *args, **named)

        return replaced

    def after_step_8(original):
        def replaced(folder, *args):
            return kill() if (tmp_path / folder / "checkpoint-8").exists() else original(folder, *args)

        return replaced

    for where, name, killing, step in (
        (Trainer, "save_model", in_step_8, 4),
        (Trainer, "_save_optimizer_and_scheduler", in_step_8, 4),
        (Trainer, "_save_rng_state", in_step_8, 4),
        (TrainerState, "save_to_json", in_step_8, 4),
        (training, "rotate_checkpoints", after_step_8, 8),
    ):
        monkeypatch.setattr(where, name, killing(getattr(where, name)))
        with pytest.raises(KilledError):
            phase3("stopped")
        partial = tmp_path / "stopped.partial"
        assert last_whole_checkpoint(partial) == str(partial / f"checkpoint-{step}"), name
    assert_equal_weights(whole, phase3("stopped"))
    assert not list((tmp_path / "stopped").glob("*.partial"))


def test_killed_at_the_very_end_makes_no_step_more(phase3):
    whole = phase3("whole", None, "--max_steps", "7")
    with pytest.raises(KilledError):
        phase3("stopped", None, "--max_steps", "7", callback=on("on_train_end", kill))
    stopped = phase3("stopped", None, "--max_steps", "7")
    assert json.loads((stopped / "run.json").read_text())["steps"] == 7
    assert_equal_weights(whole, stopped)


def test_a_signal_saves_before_it_stops(phase3, tmp_path):
    whole = phase3("whole")
    partial = tmp_path / "stopped.partial"
    for number, raised, step in ((signal.SIGTERM, Terminated, 5), (signal.SIGINT, KeyboardInterrupt, 9)):

        def send(state, _others, number=number, step=step):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        with pytest.raises(raised):
            phase3("stopped", callback=on("on_step_begin", send))
        assert last_whole_checkpoint(partial) == str(partial / f"checkpoint-{step + 1}")
    assert_equal_weights(whole, phase3("stopped"))


def test_a_second_signal_stops_at_once(phase3, tmp_path):
    def send_twice(state, _others):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    earlier = signal.signal(signal.SIGINT, raise_stop)  # as run_script does
    try:
        with pytest.raises(KeyboardInterrupt):
            phase3("stopped", callback=on("on_step_begin", send_twice))
    finally:
        signal.signal(signal.SIGINT, earlier)
    partial = tmp_path / "stopped.partial"
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-4")


def test_the_best_checkpoint_is_kept_and_loaded(phase3):
    """Evaluations made to get worse: the first is the best."""
    worse = on("on_evaluate", lambda state, others: others["metrics"].update(eval_loss=float(state.global_step)))
    flags = ["--eval_steps", "4", "--load_best_model_at_end", "true", "--metric_for_best_model", "loss"]
    out = phase3("out", None, *flags, "--max_steps", "12", "--num_train_epochs", "9", callback=worse)
    assert {path.name for path in out.glob("checkpoint*")} == {"checkpoint-4", "checkpoint-12"}
    assert_equal_weights(out, out / "checkpoint-4")
    state = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("out.partial/checkpoint-4")
    assert json.loads((out / "run.json").read_text())["heldout_mlm_loss"] == 12  # measured again, of what was loaded


def test_a_last_evaluation_is_not_made_twice(phase3):
    evaluated = []
    count = on("on_evaluate", lambda state, others: evaluated.append(state.global_step))
    once = phase3("once", None, "--max_steps", "8", "--eval_steps", "4", callback=count)
    assert evaluated == [4, 8]
    afterwards = phase3("afterwards", None, "--max_steps", "8", callback=count)
    assert evaluated == [4, 8, 8]
    losses = [json.loads((folder / "run.json").read_text())["heldout_mlm_loss"] for folder in (once, afterwards)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def poisoned(kind, first, last):
    """Phase 3's loss, of which some calls give a loss or a gradient that is not finite."""
    original, calls = loss.masked_cross_entropy, 0

    def loss_function(logits, labels, vocab_size, **others):
        nonlocal calls
        calls += 1
        is_bad = first <= calls <= last and logits.requires_grad
        if is_bad and kind == "gradient":
            logits.register_hook(lambda gradient: gradient * math.inf)
        return original(logits, labels, vocab_size, **others) * (math.nan if is_bad and kind == "loss" else 1)

    return loss_function


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_applied(phase3, tmp_path, monkeypatch, caplog, kind):
    def drop(state, others):
        if state.global_step == 3:
            others["optimizer"].zero_grad()

    without = phase3("without", callback=on("on_pre_optimizer_step", drop))
    monkeypatch.setattr(loss, "masked_cross_entropy", poisoned(kind, 4, 4))
    with caplog.at_level(logging.WARNING):
        out = phase3("out")
    assert_equal_weights(without, out)
    assert json.loads((out / "run.json").read_text())["skipped_steps"] == 1
    (said,) = [message for message in caplog.messages if "is not applied" in message]
    store = tokenize_split(tmp_path / "corpus", "train", "text", tiny_tokenizer(tmp_path / "init"), 32)
    rows = list(PackedSampler(store.lengths, 128, 42))[3].rows
    assert "step 4 is not applied: loss " in said
    assert re.search(r"rows ([\d, ]+) of", said)[1] == ", ".join(map(str, rows))


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(phase3, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "masked_cross_entropy", poisoned("loss", 6, 99))
    with pytest.raises(UserError, match=r"step 16: .* 11 times in a row; last good checkpoint: .*checkpoint-12;"):
        phase3("out", None, "--num_train_epochs", "9")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_never_of_weights_that_are_not_finite(phase3, tmp_path):
    def spoil(state, others):
        if state.global_step == 8:
            others["model"].head.dense.weight.data[0, 0] = math.nan

    with pytest.raises(UserError, match=r"step 8: weight head.dense.weight .*last good checkpoint: .*checkpoint-4;"):
        phase3("out", callback=on("on_step_end", spoil))
    assert not (tmp_path / "out.partial" / "checkpoint-8").exists()


def test_a_full_disk_at_a_checkpoint_loses_nothing_that_was_complete(phase3, tmp_path):
    whole = phase3("whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(state, _others):
        if state.global_step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    try:
        with pytest.raises(Exception, match=r"File too large|failed writing|unexpected pos"):
            phase3("full", callback=on("on_step_end", fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    partial = tmp_path / "full.partial"
    assert last_whole_checkpoint(partial) == str(partial / "checkpoint-4")
    assert_equal_weights(whole, phase3("full"))


def test_stable_adamw_and_the_trapezoidal_schedule(phase3):
    flags = ["--optim", "stable_adamw", "--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "0.2"]
    flags += ["--max_steps", "30"]
    record = json.loads((phase3("out", None, *flags, "--logging_steps", "1") / "run.json").read_text())
    rates = [entry["learning_rate"] for entry in record["history"] if "learning_rate" in entry]
    steps, warmup, decay = 30, 6, 3  # the warm-up is a fifth of the steps as asked for, the decay the last tenth
    assert len(rates) == record["steps"] == steps
    assert rates[:warmup] == pytest.approx([1e-2 * step / warmup for step in range(warmup)])
    assert rates[warmup : steps - decay] == pytest.approx([1e-2] * (steps - decay - warmup))
    assert rates[steps - decay :] == pytest.approx([1e-2 * (decay - step) / decay for step in range(decay)])
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
        (["--per_device_train_batch_size", "4"], "per_device_train_batch_size: batches are counted in tokens here"),
        (["--resume_from_checkpoint", "mlm"], "resume_from_checkpoint: a killed run goes on by itself"),
        (["--save_only_model", "true"], "save_only_model: a checkpoint without the state of the optimiser"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: 0, expected at least 1"),
        (["--max_seq_length", "4"], "max_seq_length: 4, expected at least 8"),
        (["--num_train_epochs", "0"], "num_train_epochs: 0.0, expected more than 0"),
        (["--report_to", "nobody"], "report_to: nobody is not supported"),
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
