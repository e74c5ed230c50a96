"""Whether a device computes what it should: attention, gradients, the test suite, phases that are killed, torchrun.

`python -m benchmarks.gpu correctness` runs these checks. A check returns what it measured, by name, and raises
UserError if a value is outside its bound.
"""

import importlib.util
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import ModernBertConfig, ModernBertForMaskedLM

from benchmarks.memory import write_source
from benchmarks.speed import ROOT
from benchmarks.training import bf16, device
from benchmarks.workload import MLM_PROBABILITY
from modernbert_small.packed.attention import packed_sdpa_attention, use_packed_attention, varlen_attention
from modernbert_small.packed.batches import packed_features
from modernbert_small.pretrain.loss import masked_cross_entropy
from modernbert_small.pretrain.masking import IGNORED
from modernbert_small.run.artefacts import working_folder
from modernbert_small.run.devices import compute_dtype
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_tokenizer
from modernbert_small.run.records import read_run
from modernbert_small.run.shards import split_files

Checked = dict[str, float | str]
# Below, around and above the kernels' tiles of 64 and 128, and the student's longest row.
ROWS = {
    "of 1": [1],
    "of 63 to 66": [63, 64, 65, 66],
    "of 127 to 130": [127, 128, 129, 130],
    "of 1,024": [1024],
    "of all these": [1, 63, 64, 65, 66, 127, 128, 129, 130, 1024],
}
HEADS, HEAD_DIM, WINDOW = 6, 64, 65
# Bounds of relative errors. A value in bf16 is rounded by up to 2^-9 of itself, and attention rounds several times.
MOST_ERROR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
LEAST_GRADIENT_COSINE = 0.99
MOST_LOSS_DIFFERENCE, LEAST_LABEL_COSINE = 0.01, 0.999
STEPS, SAVE_STEPS = 40, 10


def attention() -> Checked:
    """The largest relative error of our kernels' output and gradients, against float32 row by row."""
    kernels: dict[str, Callable[..., tuple[Tensor, None]]] = {"packed_sdpa": packed_sdpa_attention}
    if device().type == "cuda":
        kernels["varlen"] = varlen_attention
    found: Checked = {}
    for what, lengths in ROWS.items():
        for window in (None, WINDOW):
            expected = output_and_gradients(row_by_row, lengths, window, torch.float32)
            for name, kernel in kernels.items():
                dtype = compute_dtype(device())
                errors = map(relative_error, output_and_gradients(kernel, lengths, window, dtype), expected)
                where = f"{name}, rows {what}, {'sliding' if window else 'whole rows'}"
                found[where] = at_most(MOST_ERROR[dtype], max(errors), where)
    return found if "varlen" in kernels else found | {"varlen": "not run: it needs CUDA"}


def output_and_gradients(
    kernel: Callable[..., tuple[Tensor, None]], lengths: list[int], window: int | None, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients of q, k and v, in float32, for the same random numbers each time.

    Args:
        kernel: as transformers calls it.
        lengths: tokens of each row.
        window: one more than the tokens that are seen to each side; None to see the whole row.
        dtype: of the input.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, sum(lengths), HEAD_DIM)
    # Rounded to bf16 for all, so that only the computation differs.
    q, k, v, weight = (torch.randn(shape, generator=generator).bfloat16().to(device(), dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device())
    out, _ = kernel(
        torch.nn.Module(), *inputs, None, sliding_window=window, cu_seq_lens_q=ends, max_length_q=max(lengths)
    )
    out.backward(weight.transpose(1, 2))
    return [out.detach().float(), *(x.grad.float() for x in inputs if x.grad is not None)]


def row_by_row(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    sliding_window: int | None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
) -> tuple[Tensor, None]:
    """Attention as it is defined, one row at a time; arguments and result as in `varlen_attention`."""
    outputs = []
    for first, last in itertools.pairwise(cu_seq_lens_q.tolist()):
        q, k, v = (x[0, :, first:last] for x in (query, key, value))
        scores = q @ k.transpose(1, 2) / HEAD_DIM**0.5
        position = torch.arange(last - first, device=q.device)
        if sliding_window is not None:
            scores = scores.masked_fill((position[:, None] - position).abs() >= sliding_window, float("-inf"))
        outputs.append(torch.softmax(scores, -1) @ v)
    return torch.cat(outputs, 1).transpose(0, 1)[None], None


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what was expected, which is 0 for the gradients of rows of 1."""
    return float((found - expected).norm() / expected.norm().clamp(min=1))


def at_most(bound: float, found: float, what: str) -> float:
    """A value that is within its bound.

    Raises:
        UserError: it is not, or it is not finite.
    """
    if not found <= bound:
        raise UserError(f"{what}: found {found:.3g}, expected at most {bound:g}")
    return found


def whole_batch(tokens: int) -> Checked:
    """Loss and gradient of a student of 12 x 384 on one batch of about so many tokens, against float32."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 200, tokens // 200) + 1, 1024)
    ids = rng.integers(5, 1000, lengths.sum())
    features = {
        name: x.to(device()) if isinstance(x, Tensor) else x for name, x in packed_features(ids, lengths).items()
    }
    is_masked = torch.from_numpy(rng.random(len(ids)) < MLM_PROBABILITY).to(device())[None]
    labels = features["input_ids"].masked_fill(~is_masked, IGNORED)  # type: ignore[union-attr]
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(modernbert(50_368, 384, 12)).to(device())
    model.sparse_prediction, model.loss_function = True, masked_cross_entropy

    def loss_and_gradient(attention: str, dtype: torch.dtype) -> tuple[float, Tensor]:
        use_packed_attention(model, attention, device(), dtype)
        model.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**features, labels=labels).loss
        loss.backward()
        gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        return loss.item(), torch.cat(gradients)

    loss, gradient = loss_and_gradient("packed_sdpa", torch.float32)
    found: Checked = {"tokens": str(len(ids)), "loss in float32": loss}
    if not bf16():
        return found | {"loss in bf16": "not run: the device has no bf16"}
    for attention in ("auto", "packed_sdpa"):
        other, its_gradient = loss_and_gradient(attention, torch.bfloat16)
        cosine = float(cosine_similarity(its_gradient.double(), gradient.double(), 0))
        found[f"loss in bf16, {attention}"] = other
        found[f"gradient's cosine to float32, {attention}"] = cosine
        at_most(MOST_LOSS_DIFFERENCE, abs(other / loss - 1), f"relative difference of the loss, {attention}")
        at_most(1 - LEAST_GRADIENT_COSINE, 1 - cosine, f"1 - cosine of the gradient, {attention}")
    return found


def suite(paths: list[str]) -> Checked:
    """The tests' last line; they run in the time that they need on this machine."""
    command = [sys.executable, "-m", "pytest", *paths]
    if importlib.util.find_spec("xdist"):
        command += ["--numprocesses", "auto", "--dist", "loadfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise UserError(f"pytest: {lines[-1]}; {'; '.join(failed)[:2000]}")
    return {"pytest": lines[-1]}


def modernbert(vocab_size: int, hidden_size: int, layers: int, special: int = 0) -> ModernBertConfig:
    """A ModernBERT whose heads are HEAD_DIM wide.

    Args:
        vocab_size: of its tokenizer.
        hidden_size: a multiple of HEAD_DIM.
        layers: how many.
        special: id of the special tokens, which only padded input needs.
    """
    ids = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), special)
    return ModernBertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=1024,
        **ids,
    )


class Phases:
    """The five scripts on made-up text, with a tiny teacher and student whose heads are HEAD_DIM wide.

    Args:
        folder: for all that they write. Phases that are finished there are not run again.
        tokenizer: folder or hub id.
    """

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        if not (folder / "made.parquet").exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._write_teacher()
            write_source(folder / "made.parquet", 800)

    def until_labels(self) -> Checked:
        """Phases 1 to 4, of which 3 and 4 also run with a kill."""
        self.run("mlm/create_dataset.py", "corpus")
        self.run("mlm/init_model_mlm.py", "init")
        found = self._killed("mlm/pre_train.py", "mlm", "checkpoint-*", "heldout_mlm_loss")
        self.run("create_distil_dataset.py", "distil", "--teacher_output_dir", "teacher")
        self._kill("create_distil_dataset.py", "distil_killed", "*", "--teacher_output_dir", "teacher_killed")
        labels = [self._labels(name) for name in ("distil", "distil_killed")]
        cosine = float((labels[0] * labels[1]).sum(1).min())
        at_most(1 - LEAST_LABEL_COSINE, 1 - cosine, "1 - least cosine of a label to that of a killed run")
        return found | {"least cosine of a label to that of a killed run": cosine}

    def distillation(self) -> Checked:
        """Phase 5, without and with a kill."""
        return self._killed("distil_train.py", "model", "checkpoint-*", "heldout_similarity")

    def torchrun(self) -> Checked:
        """Phase 3 as torchrun's only process, which must end as it does without torchrun."""
        command = ["-m", "torch.distributed.run", "--nproc_per_node", "1", ROOT / "mlm/pre_train.py"]
        self._call([*command, *self._flags("mlm/pre_train.py", "mlm_torchrun")])
        return self._same("heldout_mlm_loss", "mlm", "mlm_torchrun")

    def run(self, script: str, output: str, *more: str) -> None:
        """Run a script to its end; a finished one does nothing."""
        self._call([ROOT / script, *self._flags(script, output), *more])

    def _flags(self, script: str, output: str) -> list[str]:
        """The command line of a script, apart from phase 4's second folder."""
        training = f"--max_seq_length 128 --tokens_per_batch 1024 --max_steps {STEPS} --report_to none"
        training += f" --eval_steps {SAVE_STEPS} --save_steps {SAVE_STEPS} --logging_steps {STEPS}"
        lines = {
            "mlm/create_dataset.py": f"--sources made=made.parquet --tokenizer_name_or_path {self.tokenizer} "
            "--max_seq_length 128 --validation_rows 100 --eval_datasets",
            "mlm/init_model_mlm.py": "--teacher_name_or_path encoder --hidden_size 128 --num_hidden_layers 4 "
            "--num_attention_heads 2 --intermediate_size 256 --train_file corpus",
            "mlm/pre_train.py": f"--model_name_or_path init --train_file corpus {training}",
            "create_distil_dataset.py": "--teacher_name_or_path sentences --train_file corpus --embedding_dim 128 "
            "--pca_sample_size 500",
            "distil_train.py": "--model_name_or_path mlm --train_file distil --teacher_name_or_path teacher "
            f"--eval_datasets {training}",
        }
        return ["--output_dir", output, *lines[script].split()]

    def _call(self, words: list[Any]) -> None:
        """Run Python in the folder.

        Raises:
            UserError: it failed.
        """
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(command[1:6])} failed with exit status {done.returncode}: {done.stderr[-800:]}")

    def _kill(self, script: str, output: str, sign: str, *more: str) -> None:
        """Run a script, kill it as soon as its unfinished folder holds a file like `sign`, and run it to its end."""
        if (self.folder / output).exists():
            return
        command = [sys.executable, str(ROOT / script), *self._flags(script, output), *more]
        process = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(working_folder(self.folder / output).glob(sign)):
            time.sleep(0.005)
        process.kill()
        process.wait()
        if (self.folder / output).exists():
            raise UserError(f"{script} was finished before it was killed; remove {self.folder / output} and try again")
        self.run(script, output, *more)

    def _killed(self, script: str, output: str, sign: str, measured: str) -> Checked:
        """Run a script without a kill and with one, and compare what its record says at the end."""
        self.run(script, output)
        self._kill(script, f"{output}_killed", sign)
        return self._same(measured, output, f"{output}_killed")

    def _same(self, measured: str, *outputs: str) -> Checked:
        """One measurement of two runs, which may differ by what the order of sums on a GPU changes."""
        values = {f"{measured}, {output}": float(read_run(self.folder / output)[measured]) for output in outputs}
        first, second = values.values()
        at_most(MOST_LOSS_DIFFERENCE, abs(second - first) / max(abs(first), 1), " and ".join(values))
        return dict(values)

    def _labels(self, name: str) -> np.ndarray:
        """The labels of the training split, (N, 128) float32, of length 1 without the rounding to float16."""
        columns = [pq.read_table(path, columns=["label"])["label"] for path in split_files(self.folder / name, "train")]
        labels = np.concatenate([np.array(column.to_pylist(), np.float32) for column in columns])
        return labels / np.linalg.norm(labels, axis=1, keepdims=True)

    def _write_teacher(self) -> None:
        """Write phase 2's teacher, `encoder`, and phase 4's, `sentences`, of random weights."""
        backend = load_tokenizer("--tokenizer", self.tokenizer)
        torch.manual_seed(0)
        config = modernbert(len(backend), 3 * HEAD_DIM, 6, backend.pad_token_id)
        ModernBertForMaskedLM(config).save_pretrained(self.folder / "encoder")
        backend.save_pretrained(self.folder / "encoder")
        transformer = Transformer(str(self.folder / "encoder"), max_seq_length=128)
        modules = [transformer, Pooling(3 * HEAD_DIM, "mean")]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(self.folder / "sentences"))
