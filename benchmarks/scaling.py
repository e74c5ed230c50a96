"""The speed of one step of phases 3, 4 and 5, by the length of the rows and by the number of tokens in a batch.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --teacher_layers 22 --lengths 512 --tokens_per_batch 65536

Rows hold random tokens, since the cost of a step does not depend on what the tokens are. Utilisation is the counted
FLOP/s (`modernbert_small/packed/flops.py`) over the rate of a large matrix product in the same precision, which is
measured first. Traffic is the sum of what each operator of a step reads and writes. It is counted in a step that is
not timed, and a compiled or fused step moves less. Writes scaling.md into --output_dir.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from benchmarks.prepare import VOCAB_SIZE
from benchmarks.speed import machine
from benchmarks.training import bf16, device, synchronise
from benchmarks.workload import MLM_PROBABILITY, STUDENT_WIDTH, TEACHER_WIDTH
from modernbert_small.packed.attention import use_packed_attention
from modernbert_small.packed.batches import packed_features
from modernbert_small.packed.flops import training_flops_per_token
from modernbert_small.pretrain.loss import masked_cross_entropy
from modernbert_small.pretrain.masking import IGNORED
from modernbert_small.run.devices import compute_dtype
from modernbert_small.run.tables import markdown_table

PHASES = ("mlm", "labels", "distillation")
MASK_ID = 4


@dataclass(frozen=True)
class Cost:
    """What one step costs.

    Attributes:
        phase: one of PHASES.
        length: tokens of each row.
        tokens: in the batch.
        seconds: median over the timed steps.
        flops_per_token: counted, forward and backward.
        bytes_per_token: what the step's operators read and write.
    """

    phase: str
    length: int
    tokens: int
    seconds: float
    flops_per_token: float
    bytes_per_token: float

    def cells(self, rate: float) -> list[str]:
        """A row of the table.

        Args:
            rate: FLOP/s of the large matrix product.
        """
        speed = self.tokens / self.seconds
        return [
            self.phase,
            f"{self.length:,}",
            f"{self.tokens:,}",
            f"{speed:,.0f}",
            f"{self.flops_per_token / 1e6:,.0f}",
            f"{self.bytes_per_token / 1e3:,.0f}",
            f"{speed * self.flops_per_token / rate:.0%}",
        ]


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Count one operator; PyTorch calls this for each."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def matrix_product_rate(repeats: int = 10) -> float:
    """FLOP/s of a product of two large square matrices in the precision of training, the best of `repeats` times."""
    size = 8192 if device().type == "cuda" else 2048
    dtype = torch.bfloat16 if bf16() else torch.float32
    a = torch.randn(size, size, device=device()).to(dtype)
    b = torch.randn(size, size, device=device()).to(dtype)
    return 2 * size**3 / min(seconds_of(lambda: a @ b) for _ in range(repeats))


def seconds_of(step: Callable[[], object]) -> float:
    """The seconds of one call, including the device's work."""
    synchronise()
    began = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - began


def config(width: int, layers: int, neurons: int) -> ModernBertConfig:
    """A ModernBERT whose heads are 64 wide."""
    special = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 0)
    return ModernBertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=neurons,
        max_position_embeddings=8192,
        **special,
    )


def batch(length: int, tokens: int, seed: int) -> dict[str, Any]:
    """Packed rows of random tokens, all of one length, on the device."""
    ids: NDArray[np.int64] = np.random.default_rng(seed).integers(5, 50_000, tokens // length * length)
    features = packed_features(ids, np.full(tokens // length, length))
    return {name: x.to(device()) if isinstance(x, Tensor) else x for name, x in features.items()}


class Steps:
    """The models of the three phases, and one step of each phase."""

    def __init__(self, teacher_layers: int) -> None:
        torch.manual_seed(0)
        student = config(STUDENT_WIDTH, 12, 768)
        self.models = {
            "mlm": ModernBertForMaskedLM(student),
            "labels": ModernBertModel(config(TEACHER_WIDTH, teacher_layers, 1152)).eval(),
            "distillation": ModernBertModel(student),
        }
        self.models["mlm"].sparse_prediction = True
        self.models["mlm"].loss_function = masked_cross_entropy
        self.optimizers = {}
        for phase, model in self.models.items():
            model.to(device())
            use_packed_attention(model, "auto", device(), compute_dtype(device()))
            self.optimizers[phase] = torch.optim.AdamW(model.parameters(), fused=True)

    def step(self, phase: str, inputs: dict[str, Any]) -> None:
        """Forward; for the phases that train, backward and AdamW too."""
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16()):
            if phase == "labels":
                with torch.inference_mode():
                    self.models[phase](**inputs)
                return
            loss = self._mlm_loss(inputs) if phase == "mlm" else self._distillation_loss(inputs)
        loss.backward()
        self.optimizers[phase].step()
        self.optimizers[phase].zero_grad()

    def _mlm_loss(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of a batch of which three in ten tokens are masked."""
        ids = inputs["input_ids"]
        is_masked = torch.arange(ids.shape[1], device=ids.device) % 10 < 10 * MLM_PROBABILITY
        masked = {**inputs, "input_ids": ids.masked_fill(is_masked, MASK_ID)}
        return self.models["mlm"](**masked, labels=ids.masked_fill(~is_masked, IGNORED)).loss

    def _distillation_loss(self, inputs: dict[str, Any]) -> Tensor:
        """The mean squared error to labels of zeros."""
        states = self.models["distillation"](**inputs).last_hidden_state
        vectors = states.view(-1, inputs["max_length_q"], STUDENT_WIDTH).float().mean(1)
        return mse_loss(torch.nn.functional.normalize(vectors), torch.zeros_like(vectors))

    def cost(self, phase: str, length: int, tokens: int, repeats: int) -> Cost:
        """Measure one size, after one step in which the traffic is counted.

        Args:
            phase: one of PHASES.
            length: tokens of each row.
            tokens: about as many in the batch.
            repeats: number of timed steps.
        """
        batches = [batch(length, tokens, seed) for seed in range(repeats + 1)]
        with Traffic() as traffic:
            self.step(phase, batches[0])
        seconds = statistics.median(seconds_of(partial(self.step, phase, inputs)) for inputs in batches[1:])
        tokens = batches[0]["input_ids"].numel()
        share = MLM_PROBABILITY if phase == "mlm" else 0.0
        flops = training_flops_per_token(self.models[phase].config, np.array([length]), share)
        if phase == "labels":
            flops /= 3  # forward alone: backward counts as twice forward
        return Cost(phase, length, tokens, seconds, flops, traffic.bytes / tokens)


def markdown(costs: Sequence[Cost], rate: float) -> str:
    """The table, and below it the machine.

    Args:
        costs: the table's rows.
        rate: FLOP/s of the large matrix product.
    """
    header = ["", "tokens a row", "a batch", "tokens/s", "MFLOP a token", "kB a token", "utilisation"]
    table = markdown_table([header, *(cost.cells(rate) for cost in costs)])
    where = {**machine(), "matrix product": f"{rate / 1e12:.2f} TFLOP/s in {'bf16' if bf16() else 'float32'}"}
    return f"{table}\n\n{', '.join(f'{key} {value}' for key, value in where.items())}\n"


def main() -> None:
    """Measure by length at one batch size, then by batch size at one length."""
    cuda = device().type == "cuda"
    batch_sizes = [1024, 4096, 16_384, 65_536] if cuda else [1024, 4096, 16_384]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--tokens_per_batch", type=int, nargs="+", default=batch_sizes)
    parser.add_argument("--teacher_layers", type=int, default=22 if cuda else 4)
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3, help="steps of which the median is shown")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rate = matrix_product_rate()
    steps = Steps(args.teacher_layers)
    sizes = [(length, 16384 if cuda else 4096) for length in args.lengths]
    sizes += [(256, tokens) for tokens in args.tokens_per_batch if (256, tokens) not in sizes]
    costs = [steps.cost(phase, length, tokens, args.repeats) for phase in PHASES for length, tokens in sizes]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "scaling.md").write_text(markdown(costs, rate), encoding="utf-8")
    print(markdown(costs, rate))


if __name__ == "__main__":
    main()
