"""An embedding model as ONNX or OpenVINO, in float32 or int8, checked against PyTorch before it gets its name.

    python -m modernbert_small.export checkpoints/ModernBERT-small-v2 --format onnx --dtype int8
    python -m modernbert_small.export <model> --format openvino --datasets <folder> --output_dir <folder>

Out: <model>-<format>-<dtype>, laid out as sentence-transformers' backends read it. The graph goes from `input_ids` and
`attention_mask` to `sentence_embedding`, pooling included, at any length and batch size: the runtime and a tokenizer
are all that it needs. Needs the extra [onnx] or [openvino].

sentence-transformers' own exporters go through optimum, whose releases stop at transformers 4.57 (optimum-onnx 0.1.0)
and 5.5 (optimum-intel 2.2.0). What optimum calls is called here: torch.onnx, ONNX Runtime's quantiser, NNCF.
"""

import argparse
import importlib.util
import json
import logging
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from modernbert_small.corpus.docstrings import python_files, read_docstrings
from modernbert_small.evaluation.sets import PairSet, RetrievalSet, evaluator, load_evaluation_sets
from modernbert_small.run.artefacts import begin, write_json
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_sentence_transformer, require_finite
from modernbert_small.run.script import run_script

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
Runtime = Callable[[NDArray[np.int64], NDArray[np.int64]], Vectors]

# What each format's extra brings, and the file that sentence-transformers' backend of that name looks for.
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino", "nncf")}
FILES = {"onnx": "onnx/model.onnx", "openvino": "openvino/openvino_model.xml"}
LEAST_COSINE = {"float32": 0.9999, "int8": 0.99}
PARITY_TEXTS = 256
BATCH_SIZE = 32


class _Whole(torch.nn.Module):
    """A SentenceTransformer with tensors for arguments, as an exporter wants it."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
        return out["token_embeddings"], out["sentence_embedding"]


class ExportedModel(SentenceTransformer):
    """A model whose vectors a runtime computes; its tokenizer, prompts and batches stay as they were."""

    def __init__(self, model: SentenceTransformer, runtime: Runtime) -> None:
        super().__init__(
            modules=list(model),
            prompts=model.prompts,
            default_prompt_name=model.default_prompt_name,
            similarity_fn_name=model.similarity_fn_name,
            device="cpu",
        )
        self.runtime = runtime

    def forward(self, input: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:  # noqa: A002, as torch names it
        """Embeddings of a batch of tokenised texts."""
        vectors = self.runtime(input["input_ids"].numpy(), input["attention_mask"].numpy())
        return {"sentence_embedding": torch.from_numpy(vectors)}


def require_extra(format: str) -> None:  # noqa: A002, the flag's name
    """Refuse a format whose packages are missing."""
    missing = [name for name in NEEDED[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {format}: {', '.join(missing)} not installed; install with: pip install -e .[{format}]"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters say to their own developers, thousands of lines of it."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_onnx(model: SentenceTransformer, file: Path) -> None:
    """The whole model as one graph; batch size and length are free."""
    ids = torch.ones((2, 16), dtype=torch.int64)
    mask = ids.clone()
    mask[1, 8:] = 0  # a mask that hides nothing would be left out of the graph
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet():
            program = torch.onnx.export(
                _Whole(model).eval(),
                (ids, mask),
                dynamic_shapes=(free, free),
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state", "sentence_embedding"],
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch.onnx cannot export this model: {' '.join(str(error).split())[:300]}") from error
    assert program is not None, "dynamo=True gives a program"
    program.save(file)


def quantise_onnx(float_file: Path, file: Path) -> None:
    """Dynamic int8: weights now, activations as they come.

    The MLP's second matrix, the one that narrows, stays in float32: what it reads has outliers that one scale for all
    rounds away. All-MiniLM-L6-v2 keeps a lowest cosine of .990 so, .985 with that matrix in int8 too.
    """
    import onnx  # an extra, as is onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(float_file)).graph
    shapes = {weight.name: weight.dims for weight in graph.initializer}
    products = ((node.name, shapes.get(node.input[1])) for node in graph.node if node.op_type == "MatMul")
    narrowing = [name for name, shape in products if shape is not None and shape[0] > shape[1]]
    with _quiet():
        quantize_dynamic(float_file, file, weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=narrowing)


def write_openvino(onnx_file: Path, file: Path, dtype: str) -> None:
    """OpenVINO's form of an ONNX file; int8 is of the weights alone, which needs no sample to calibrate on."""
    import openvino  # an extra, as is nncf

    graph = openvino.convert_model(onnx_file)
    if dtype == "int8":
        import nncf

        nncf.set_log_level(logging.ERROR)
        graph = nncf.compress_weights(graph)
    openvino.save_model(graph, file, compress_to_fp16=False)


def open_runtime(file: Path) -> Runtime:
    """A session on the CPU, with as many threads as torch has here."""
    threads = torch.get_num_threads()
    if file.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda ids, mask: session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0]
    import openvino

    # Where there is bf16, OpenVINO would compute in it and hide what the file is worth.
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(file, "CPU", hints).create_infer_request()
    return lambda ids, mask: request.infer([ids, mask])["sentence_embedding"].copy()


def export(model: SentenceTransformer, folder: Path, format: str, dtype: str) -> Path:  # noqa: A002, the flag's name
    """Write a model's folder with its graph in place of its encoder's weights; returns the graph's file."""
    model.save_pretrained(str(folder), create_model_card=False)
    use_older_names(folder)
    for weights in folder.glob("*.safetensors*"):  # the encoder's; a Dense keeps its own, in its folder
        weights.unlink()
    file = folder / FILES[format]
    file.parent.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch, "model.onnx")
        write_onnx(model, whole)
        if format == "openvino":
            write_openvino(whole, file, dtype)
        elif dtype == "int8":
            quantise_onnx(whole, file)
        else:
            for part in whole.parent.iterdir():
                part.rename(file.parent / part.name)
    return file


def use_older_names(folder: Path) -> None:
    """Name tokenizer and modules as transformers 4 and sentence-transformers 5 do, which is what optimum runs with.

    Newer releases know these names too.
    """
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rsplit('.', 1)[-1]}"
    write_json(folder / "modules.json", modules)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})


def parity_texts(retrieval_sets: Sequence[RetrievalSet], pair_sets: Sequence[PairSet]) -> list[str]:
    """Texts of the sets in equal parts of queries and documents, docstrings if there are no sets; a fixed sample."""
    rng = random.Random(0)
    pools = [[text for one in retrieval_sets for text in getattr(one, part).values()] for part in ("queries", "corpus")]
    pools.append([text for one in pair_sets for text in (*one.first, *one.second)])
    pools = [pool for pool in pools if pool]
    if pools:
        share = PARITY_TEXTS // len(pools)
        return [text for pool in pools for text in rng.sample(pool, min(share, len(pool)))]
    files = python_files()
    rng.shuffle(files)
    texts: list[str] = []
    while files and len(texts) < PARITY_TEXTS:
        texts += [text for docstring in (read_docstrings(files.pop()) or [])[:2] for text in docstring if text.strip()]
    return texts[:PARITY_TEXTS]


def measure(model: SentenceTransformer, texts: Sequence[str]) -> tuple[Vectors, dict[str, float]]:
    """Vectors of texts one by one, in batches, and of all lengths in one batch, under the padding of the longest.

    Returns:
        (2 N + n, D), and median milliseconds of a text and texts a second in batches.
    """
    by_length = sorted(texts, key=len)
    mixed = [*by_length[:: max(1, len(texts) // 15)], " ".join(by_length)]  # the last is cut at the longest input
    model.encode(list(mixed), batch_size=len(mixed), show_progress_bar=False)  # warm
    alone, seconds = [], []
    for text in texts:
        began = time.perf_counter()
        alone.append(model.encode(text, show_progress_bar=False))
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    batched = model.encode(list(texts), batch_size=BATCH_SIZE, show_progress_bar=False)
    rate = len(texts) / (time.perf_counter() - began)
    padded = model.encode(mixed, batch_size=len(mixed), show_progress_bar=False)
    speed = {"text_milliseconds": round(1000 * float(np.median(seconds)), 2), "texts_per_second": round(rate, 1)}
    return np.concatenate([np.stack(alone), batched, padded]).astype(np.float32), speed


def cosines(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """Of rows (N, D) of two matrices (N,); NaN where one is not finite or has no length."""
    first, second = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))


def require_parity(found: NDArray[np.float64], what: str, dtype: str) -> dict[str, float]:
    """Refuse vectors that are not PyTorch's.

    Raises:
        UserError: the lowest cosine is below LEAST_COSINE, or not a number.
    """
    lowest = float(found.min())
    if not lowest >= LEAST_COSINE[dtype]:
        remedy = "use --dtype float32, or the other --format" if dtype == "int8" else "do not ship it in this format"
        raise UserError(
            f"{what}: the lowest cosine to PyTorch's vectors is {lowest:.5f} (mean {found.mean():.5f}), expected at "
            f"least {LEAST_COSINE[dtype]}; nothing was written, {remedy}"
        )
    return {"lowest_cosine": round(lowest, 6), "mean_cosine": round(float(found.mean()), 6)}


def check(model: SentenceTransformer, file: Path, what: str, dtype: str, sets: tuple[list, list]) -> dict[str, Any]:
    """Compare a graph with the model that it was made from.

    Args:
        model: in PyTorch, on the CPU.
        file: the graph.
        what: format and dtype, for people.
        dtype: float32 or int8.
        sets: retrieval and pair sets; their texts are compared, nDCG@10 of the former.
    """
    exported = ExportedModel(model, open_runtime(file))
    texts = parity_texts(*sets)
    expected, before = measure(model, texts)
    found, after = measure(exported, texts)
    parity = require_parity(cosines(found, expected), what, dtype)
    sizes = [
        sum(value.numel() * value.element_size() for value in model.state_dict().values()),
        sum(part.stat().st_size for part in file.parent.iterdir()),
    ]
    ndcg = {
        dataset.name: [
            round(float(evaluator(dataset)(one)[f"{dataset.name}_cosine_ndcg@10"]), 4) for one in (model, exported)
        ]
        for dataset in sets[0]
    }
    rows = [
        {"system": name, "megabytes": round(size / 1e6, 1), **speed}
        for name, size, speed in zip(("PyTorch float32", what), sizes, (before, after), strict=True)
    ]
    return {"texts": len(texts), **parity, "speed": rows, "ndcg": ndcg}


def format_check(record: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = ["| | MB | ms a text | texts/s |", "| --- | ---: | ---: | ---: |"]
    for row in record["speed"]:
        milliseconds, rate = row["text_milliseconds"], row["texts_per_second"]
        lines.append(f"| {row['system']} | {row['megabytes']:.1f} | {milliseconds:.1f} | {rate:.0f} |")
    lines.append(
        f"\ncosine to PyTorch's vectors: lowest {record['lowest_cosine']:.5f}, mean {record['mean_cosine']:.5f}, of "
        f"{record['texts']} texts alone, in batches, and of all lengths in one batch"
    )
    for name, (before, after) in record["ndcg"].items():
        lines.append(f"nDCG@10, {name}: {before:.4f} -> {after:.4f} ({after - before:+.4f})")
    return "\n".join(lines)


def main() -> None:
    """Model in, folder for a runtime out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument("--format", required=True, choices=list(NEEDED), help="of the model file")
    parser.add_argument("--dtype", default="float32", choices=list(LEAST_COSINE), help="default: float32")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model's repository brings")
    parser.add_argument("--output_dir", help="folder to write; default: <model>-<format>-<dtype>")
    parser.add_argument(
        "--datasets", nargs="+", default=[], help="sets to compare on: NanoBEIR names, folders laid out like NanoBEIR"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result of other settings")
    args = parser.parse_args()
    require_extra(args.format)
    what = f"{args.format} {args.dtype}"
    output_dir = args.output_dir or f"{args.model.rstrip('/')}-{args.format}-{args.dtype}"
    settings = {name: value for name, value in vars(args).items() if name != "model"}
    run = begin("export", output_dir, settings, {"model": args.model}, args.overwrite)
    if run is None:
        return
    sets = load_evaluation_sets("--datasets", args.datasets)
    model = load_sentence_transformer("model", args.model, "cpu", args.trust_remote_code)
    require_finite(model, f"model {args.model}")
    run.resumed = False  # an export is made in one piece
    run.start()
    try:
        record = check(model, export(model, run.folder, args.format, args.dtype), what, args.dtype, sets)
    except UserError:
        shutil.rmtree(run.folder)
        raise
    run.finish(record)
    print(f"\n{format_check(record)}\n")
    logger.info("wrote %s", output_dir)


if __name__ == "__main__":
    run_script(main)
