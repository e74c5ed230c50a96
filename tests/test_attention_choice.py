"""Which attention runs where: by device, precision, width of a head, and the packages that are installed."""

import functools
import importlib.metadata
import sys

import pytest
import torch
from helpers import load_script
from transformers import ModernBertConfig, ModernBertModel
from transformers.utils import import_utils

from modernbert_small.packed.attention import choose_attn_implementation, use_packed_attention
from modernbert_small.run import devices
from modernbert_small.run.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AMPERE, TURING = (8, 0), (7, 5)
PHASE_4 = "create_distil_dataset.py"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a given compute capability."""

    def pretend(capability=AMPERE):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        has_bf16 = capability >= AMPERE
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)

    return pretend


@pytest.fixture
def flash_attn(monkeypatch, tmp_path):
    """Installs a package flash_attn with some code, which belongs to a distribution."""
    cached = (import_utils.is_flash_attn_2_available, import_utils.is_torch_cuda_available)

    def install(distribution, code):
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(code)
        information = tmp_path / f"{distribution.replace('-', '_')}-2.8.3.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.8.3\n")
        (information / "top_level.txt").write_text("flash_attn\n")
        monkeypatch.syspath_prepend(tmp_path)
        mapping = functools.cache(importlib.metadata.packages_distributions)
        monkeypatch.setattr(import_utils, "_package_distribution_mapping", mapping)
        for function in cached:
            function.cache_clear()

    yield install
    sys.modules.pop("flash_attn", None)
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "chosen"),
    [
        (CPU, AMPERE, BF16, 64, "packed_sdpa"),
        (CUDA, AMPERE, BF16, 64, "varlen"),
        (CUDA, AMPERE, FP16, 64, "varlen"),
        (CUDA, (12, 0), BF16, None, "varlen"),
        (CUDA, AMPERE, BF16, 8, "varlen"),
        (CUDA, AMPERE, BF16, 256, "varlen"),
        (CUDA, AMPERE, FP32, 64, "packed_sdpa"),  # --bf16 false
        (CUDA, TURING, FP32, 64, "packed_sdpa"),  # a T4 has no bf16
        (CUDA, TURING, FP16, 64, "packed_sdpa"),
        (CUDA, AMPERE, BF16, 12, "packed_sdpa"),  # 24 / 2, which --init embeddings allows
        (CUDA, AMPERE, BF16, 264, "packed_sdpa"),
    ],
)
def test_auto_takes_varlen_only_where_it_runs(gpu, device, capability, dtype, head_dim, chosen):
    gpu(capability)
    assert choose_attn_implementation("auto", device, dtype, head_dim)[0] == chosen
    assert choose_attn_implementation("packed_sdpa", device, dtype, head_dim)[0] == "packed_sdpa"
    if chosen == "varlen":
        assert choose_attn_implementation("varlen", device, dtype, head_dim)[0] == "varlen"
    else:
        with pytest.raises(UserError, match=r"varlen needs .*, found .*; use auto"):
            choose_attn_implementation("varlen", device, dtype, head_dim)


def test_the_width_of_a_head_comes_from_the_model(gpu):
    gpu()
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id"), 0)
    sizes = {"vocab_size": 8, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = ModernBertModel(ModernBertConfig(**sizes, intermediate_size=8, **ids))
    assert use_packed_attention(model, "auto", CUDA, BF16) == "packed_sdpa"
    with pytest.raises(UserError, match="multiple of 8 and at most 256, found 12"):
        use_packed_attention(model, "varlen", CUDA, BF16)


def test_a_request_that_cannot_work_is_named_before_anything_loads(gpu, monkeypatch):
    gpu(TURING)
    monkeypatch.setattr(sys, "argv", [PHASE_4, "--attn_implementation", "varlen", "--train_file", "."])
    with pytest.raises(UserError, match=r"varlen needs a GPU of compute capability 8.0 or more, found 7.5; use auto"):
        load_script(PHASE_4).main()


def test_a_flash_attn_that_works_is_used_if_asked_for_and_never_by_itself(gpu, flash_attn):
    gpu()
    with pytest.raises(UserError, match="flash-attn 2, which is not installed"):
        choose_attn_implementation("flash_attention_2", CUDA, BF16, 64)
    flash_attn("flash-attn", "")
    assert choose_attn_implementation("flash_attention_2", CUDA, BF16, 64)[0] == "flash_attention_2"
    assert choose_attn_implementation("auto", CUDA, BF16, 64)[0] == "varlen"


@pytest.mark.parametrize(
    ("distribution", "code", "said"),
    [
        ("flash-attn-4", "", "flash-attn 2, which is not installed"),  # has the same folder
        ("flash-attn", "raise ImportError('undefined symbol: _ZN3c10')", "found: undefined symbol: _ZN3c10"),
    ],
)
def test_a_flash_attn_that_cannot_work_is_named(gpu, flash_attn, distribution, code, said):
    gpu()
    flash_attn(distribution, code)
    with pytest.raises(UserError, match=said):
        choose_attn_implementation("flash_attention_2", CUDA, BF16, 64)
    assert choose_attn_implementation("auto", CUDA, BF16, 64)[0] == "varlen"


def test_more_processes_than_gpus_are_refused(gpu, monkeypatch):
    gpu()
    assert devices.best_device() == CUDA
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"process 1 of this machine finds 1 GPUs.*--nproc_per_node 1"):
        devices.best_device()
