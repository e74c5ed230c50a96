"""Export an embedding model to ONNX or OpenVINO, in float32 and int8, or join it with its teacher; check the result.

    python -m modernbert_small.export checkpoints/ModernBERT-small-v2 --format onnx
    python -m modernbert_small.export <model> --format openvino --dtypes float32 --datasets <folder>

Out: the folder <model>-<format>, which is written only if the checks pass. Its files lie where sentence-transformers'
backends, transformers.js and fastembed look for them. The graphs map `input_ids` and `attention_mask` to
`sentence_embedding`, pooling included, for any length and batch size, so that they need nothing but the runtime and a
tokenizer. Exporting needs the extra [onnx] or [openvino].

    python -m modernbert_small.export checkpoints/ModernBERT-small-v2 --format router --teacher checkpoints/teacher

joins student and teacher in one folder, <model>-router, whose `encode_query` is the student's and whose
`encode_document` is the teacher's. It needs no extra.

sentence-transformers' own exporters need optimum, whose releases support transformers up to 4.57 (optimum-onnx 0.1.0)
and 5.5 (optimum-intel 2.2.0). So this module calls directly what optimum calls: torch.onnx, ONNX Runtime's quantiser,
and NNCF.
"""

import argparse

from modernbert_small.run.script import check_early, command_parser, run_script

# The packages that each format's extra installs, and the names of its graphs. transformers.js calls the second one q8.
NEEDED = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino", "nncf"),
    "router": (),
}
FILES = {
    "onnx": {"float32": "onnx/model.onnx", "int8": "onnx/model_quantized.onnx"},
    "openvino": {
        "float32": "openvino/openvino_model.xml",
        "int8": "openvino/openvino_model_qint8_quantized.xml",
    },
}
DTYPES = ("float32", "int8")
# Of the cosines to PyTorch's vectors: a percentile, what it must reach, and what the mean must reach. In float32 no
# vector may differ. In int8 one unusual text decides nothing: of all-MiniLM-L6-v2 in ONNX, the lowest cosine was .982,
# the 5th percentile .992 and the mean .995.
GATES = {"float32": (0, 0.9999, 0.9999), "int8": (5, 0.985, 0.99)}
PARITY_TEXTS = 256  # texts whose vectors are compared
BATCH_SIZE = 32


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser("export", __doc__)
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument("--format", required=True, choices=list(NEEDED), help="format to export to")
    parser.add_argument(
        "--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="types of the weights; default: both"
    )
    parser.add_argument("--teacher", help="for --format router: the reduced teacher that made the student's labels")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model's repository brings")
    parser.add_argument("--output_dir", help="folder to write; default: <model>-<format>")
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        help="sets to compare on: NanoBEIR names, folders laid out like NanoBEIR, stsb, Parquet files of sentence "
        "pairs; default: none, vectors of docstrings are compared",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the folder if it was made with other settings"
    )
    args = parser.parse_args()
    if (args.format == "router") != (args.teacher is not None):
        parser.error("--format router and --teacher belong together; pass both or neither")
    return args


if __name__ == "__main__":
    check_early(parse_arguments)  # before the imports below, which take seconds

import importlib.util
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
from modernbert_small.distil.router import join
from modernbert_small.evaluation.account import embed_set, gains_of
from modernbert_small.evaluation.embedder import Embedder
from modernbert_small.evaluation.metrics import ndcg_at_10, similarities
from modernbert_small.evaluation.sets import PairSet, RetrievalSet, load_evaluation_sets
from modernbert_small.run.artefacts import begin
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_sentence_transformer, require_finite
from modernbert_small.run.records import write_json
from modernbert_small.run.saving import save_embedding_model
from modernbert_small.run.tables import aligned

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
# Maps input_ids (B, L) and attention_mask (B, L) to vectors (B, D).
Runtime = Callable[[NDArray[np.int64], NDArray[np.int64]], Vectors]


class _Whole(torch.nn.Module):
    """A SentenceTransformer whose arguments are tensors, which torch's exporter needs."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, L, D) and sentence embeddings (B, D) of ids and mask (B, L)."""
        out = self.model({"input_ids": input_ids, "attention_mask": attention_mask})
        return out["token_embeddings"], out["sentence_embedding"]


class ExportedModel(SentenceTransformer):
    """A model whose vectors are computed by another runtime; its tokenizer, prompts and batches are unchanged."""

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
        """Embeddings (B, D) of a batch of tokenised texts."""
        vectors = self.runtime(input["input_ids"].numpy(), input["attention_mask"].numpy())
        return {"sentence_embedding": torch.from_numpy(vectors)}


def require_extra(format: str) -> None:  # noqa: A002, the flag's name
    """Refuse a format whose packages are missing.

    Raises:
        UserError: names the missing packages and the extra that installs them.
    """
    missing = [name for name in NEEDED[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format {format}: {', '.join(missing)} not installed; install with: pip install -e .[{format}]"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' thousands of log lines and warnings, which are for their own developers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_onnx(model: SentenceTransformer, file: Path) -> None:
    """Write the whole model as one graph that takes any batch size and length.

    Raises:
        UserError: torch.onnx cannot export the model.
    """
    ids = torch.ones((2, 16), dtype=torch.int64)
    mask = ids.clone()
    mask[1, 8:] = 0  # with a mask of ones the exporter would leave the mask out of the graph
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
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"torch.onnx cannot export this model: {reason}; export a model of another architecture, or use this one "
            "with PyTorch"
        ) from error
    assert program is not None, "torch.onnx.export returns a program with dynamo=True"
    program.save(file)


def quantise_onnx(float_file: Path, file: Path) -> None:
    """Quantise an ONNX file to int8: weights now, activations dynamically at inference.

    The MLP's second matrix, whose output is narrower than its input, stays in float32. Its input has outliers, and one
    scale for all values would round the others away. The lowest cosine of all-MiniLM-L6-v2 is 0.990 with this matrix in
    float32, and 0.985 with it in int8.

    Args:
        float_file: the float32 graph.
        file: where to write the int8 graph.
    """
    import onnx  # comes with the extra [onnx], as does onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(float_file)).graph
    shapes = {weight.name: weight.dims for weight in graph.initializer}
    products = ((node.name, shapes.get(node.input[1])) for node in graph.node if node.op_type == "MatMul")
    narrowing = [name for name, shape in products if shape is not None and shape[0] > shape[1]]
    with _quiet():
        quantize_dynamic(float_file, file, weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=narrowing)


def write_openvino(onnx_file: Path, file: Path, dtype: str) -> None:
    """Convert an ONNX file to OpenVINO's format.

    Args:
        onnx_file: the float32 graph.
        file: where to write OpenVINO's XML file; its weights lie beside it.
        dtype: float32, or int8, which quantises the weights alone and so needs no texts for calibration.
    """
    import openvino  # comes with the extra [openvino], as does nncf

    graph = openvino.convert_model(onnx_file)
    if dtype == "int8":
        import nncf

        nncf.set_log_level(logging.ERROR)
        graph = nncf.compress_weights(graph)
    openvino.save_model(graph, file, compress_to_fp16=False)


def open_runtime(file: Path) -> Runtime:
    """Open a graph on the CPU, with as many threads as torch uses."""
    threads = torch.get_num_threads()
    if file.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda ids, mask: session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0]
    import openvino

    # By default OpenVINO computes in bf16 where the processor has it, and the check would measure bf16's errors too.
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(file, "CPU", hints).create_infer_request()
    return lambda ids, mask: request.infer([ids, mask])["sentence_embedding"].copy()


def export(model: SentenceTransformer, folder: Path, format: str, dtypes: Sequence[str]) -> dict[str, Path]:  # noqa: A002
    """Write a model's folder with graphs in place of the encoder's weights.

    Args:
        model: on the CPU, in float32.
        folder: where to write.
        format: onnx or openvino.
        dtypes: of float32 and int8, the graphs to write.

    Returns:
        The graphs' files by dtype.
    """
    save_embedding_model(model, folder)
    write_special_tokens(model, folder)
    for weights in folder.glob("*.safetensors*"):  # the encoder's; those of a Dense module lie in its own folder
        weights.unlink()
    files = {dtype: folder / FILES[format][dtype] for dtype in DTYPES if dtype in dtypes}
    (folder / format).mkdir(exist_ok=True)
    with TemporaryDirectory(dir=folder) as scratch:
        whole = Path(scratch, "model.onnx")
        write_onnx(model, whole)
        for dtype, file in files.items():
            if format == "openvino":
                write_openvino(whole, file, dtype)
            elif dtype == "int8":
                quantise_onnx(whole, file)
            else:
                for part in whole.parent.iterdir():  # the graph, and its weights if they are too many for one file
                    shutil.copy(part, file.parent)
    return files


def write_special_tokens(model: SentenceTransformer, folder: Path) -> None:
    """Write special_tokens_map.json, which fastembed reads and transformers 5 writes no more."""
    write_json(folder / "special_tokens_map.json", model.tokenizer.special_tokens_map)


def parity_texts(retrieval_sets: Sequence[RetrievalSet], pair_sets: Sequence[PairSet]) -> list[str]:
    """A fixed sample of texts to compare vectors on.

    Args:
        retrieval_sets: queries and documents are drawn in equal parts.
        pair_sets: sentences are drawn too.

    Returns:
        At most PARITY_TEXTS texts: of the sets, or of this machine's docstrings if there are no sets.
    """
    rng = random.Random(0)
    pools = [
        [text for dataset in retrieval_sets for text in dataset.queries.values()],
        [text for dataset in retrieval_sets for text in dataset.corpus.values()],
        [text for dataset in pair_sets for text in (*dataset.first, *dataset.second)],
    ]
    pools = [pool for pool in pools if pool]
    if not pools:
        return _docstrings(rng)
    share = PARITY_TEXTS // len(pools)
    return [text for pool in pools for text in rng.sample(pool, min(share, len(pool)))]


def _docstrings(rng: random.Random) -> list[str]:
    """PARITY_TEXTS summaries and bodies of docstrings, of at most two docstrings a file."""
    files = python_files()
    rng.shuffle(files)
    texts: list[str] = []
    while files and len(texts) < PARITY_TEXTS:
        for docstring in (read_docstrings(files.pop()) or [])[:2]:
            texts += [text for text in docstring if text.strip()]
    return texts[:PARITY_TEXTS]


def measure(model: SentenceTransformer, texts: Sequence[str]) -> tuple[Vectors, dict[str, float]]:
    """Embed texts in three ways, which must give the same vectors in every runtime.

    N texts are embedded one by one, then in batches. Then n texts of all lengths are embedded in one batch, in which
    the short ones have as much padding as possible.

    Args:
        model: in PyTorch or another runtime.
        texts: N texts.

    Returns:
        The vectors (2 N + n, D), and the speed: the median `text_milliseconds` of a single text and `texts_per_second`
        in batches.
    """
    by_length = sorted(texts, key=len)
    everything = " ".join(by_length)  # longer than the model's longest input, so that it is cut there
    mixed = [*by_length[:: max(1, len(texts) // 15)], everything]
    model.encode(list(mixed), batch_size=len(mixed), show_progress_bar=False)  # a warm-up, not timed
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
    """Cosines (N,) of the rows of two matrices (N, D); NaN where a row is not finite or is zero."""
    first, second = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))


def require_parity(found: NDArray[np.float64], what: str, dtype: str) -> dict[str, float]:
    """Refuse a graph whose vectors differ too much from PyTorch's.

    Args:
        found: cosines (N,) of its vectors to PyTorch's.
        what: format and dtype, for the error.
        dtype: float32 or int8; int8 may differ more, see GATES.

    Returns:
        The lowest, the 5th percentile and the mean of the cosines.

    Raises:
        UserError: the cosines are below their gate, or one of them is NaN.
    """
    percentile, least, least_mean = GATES[dtype]
    low, mean = float(np.percentile(found, percentile)), float(found.mean())
    if not (low >= least and mean >= least_mean):  # true for NaN too
        remedy = (
            "leave int8 out of --dtypes, or use the other --format" if dtype == "int8" else "use the other --format"
        )
        name = f"{percentile}th percentile of the cosines" if percentile else "lowest cosine"
        raise UserError(
            f"{what}: the {name} to PyTorch's vectors is {low:.5f} and their mean {mean:.5f}, expected at least "
            f"{least} and {least_mean}; nothing was written, {remedy}"
        )
    values = {"lowest_cosine": float(found.min()), "percentile_5_cosine": float(np.percentile(found, 5))}
    return {name: round(value, 6) for name, value in (values | {"mean_cosine": mean}).items()}


def check(
    model: SentenceTransformer,
    files: dict[str, Path],
    format: str,  # noqa: A002
    sets: tuple[list[RetrievalSet], list[PairSet]],
) -> dict[str, Any]:
    """Compare graphs with the model that they were made from.

    Args:
        model: in PyTorch, on the CPU.
        files: the graphs by dtype.
        format: onnx or openvino, for errors and tables.
        sets: retrieval sets and pair sets. Vectors of their texts are compared, and nDCG@10 on the retrieval sets.

    Returns:
        texts: how many were compared.
        systems: a row for PyTorch and one for each graph, with size, speed, nDCG@10 by set, and the graphs' parity.

    Raises:
        UserError: the vectors of a graph differ too much.
    """
    texts = parity_texts(*sets)
    expected, speed = measure(model, texts)
    rows = [_row("PyTorch float32", _bytes(model), speed, model, sets[0])]
    for dtype, file in files.items():
        what = f"{format} {dtype}"
        exported = ExportedModel(model, open_runtime(file))
        found, speed = measure(exported, texts)
        parity = require_parity(cosines(found, expected), what, dtype)
        parts = file.parent.glob(f"{file.stem}.*")  # OpenVINO's weights, and those of a large ONNX graph, lie beside it
        rows.append(_row(what, sum(part.stat().st_size for part in parts), speed, exported, sets[0]) | parity)
    return {"texts": len(texts), "systems": rows}


def check_router(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    folder: Path,
    sets: tuple[list[RetrievalSet], list[PairSet]],
) -> dict[str, Any]:
    """Compare a folder that joins two models with these models.

    Args:
        student: whose vectors queries must have.
        teacher: whose vectors documents must have.
        folder: where the joined model was written.
        sets: as in `check`.

    Returns:
        As `check`, with a row for the student alone and one for the joined model, without speeds.

    Raises:
        UserError: the vectors differ.
    """
    joined = load_sentence_transformer("--format router", str(folder), "cpu")
    texts = parity_texts(*sets)
    both = [(joined.encode_query, student.encode_query), (joined.encode_document, teacher.encode_document)]
    found = np.concatenate([cosines(ours(texts), theirs(texts)) for ours, theirs in both])
    parity = require_parity(found, "router", "float32")
    rows = [
        _row(name, _bytes(model), {}, model, sets[0])
        for name, model in (("student alone", student), ("student's queries, teacher's documents", joined))
    ]
    return {"texts": len(texts), "systems": [rows[0], rows[1] | parity]}


def _bytes(model: SentenceTransformer) -> int:
    """What the weights of a model take."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _row(
    system: str, size: int, speed: dict[str, float], model: SentenceTransformer, sets: Sequence[RetrievalSet]
) -> dict[str, Any]:
    """A system's name, megabytes (from bytes), speed, and nDCG@10 by set."""
    scores = {dataset.name: ndcg(system, model, dataset) for dataset in sets}
    return {"system": system, "megabytes": round(size / 1e6, 1), **speed, "ndcg": scores}


def ndcg(system: str, model: SentenceTransformer, dataset: RetrievalSet) -> float:
    """The nDCG@10 of a system's model on a set, with four decimals."""
    scores = similarities(*embed_set({system: Embedder(model)}, system, dataset))
    return round(float(ndcg_at_10(scores, gains_of(dataset)).mean()), 4)


def format_check(record: dict[str, Any]) -> str:
    """The check's measurements as a table.

    Args:
        record: see `check`.
    """
    sets = list(record["systems"][0]["ndcg"])
    columns = {"MB": ("megabytes", 1), "ms a text": ("text_milliseconds", 1), "texts/s": ("texts_per_second", 0)}
    columns |= {"lowest cosine": ("lowest_cosine", 5), "5th percentile": ("percentile_5_cosine", 5)}
    columns |= {"mean": ("mean_cosine", 5)}
    rows = [["", *columns, *sets]]
    for row in record["systems"]:
        values = [f"{row[name]:.{digits}f}" if name in row else "" for name, digits in columns.values()]
        rows.append([row["system"], *values, *(f"{row['ndcg'][name]:.4f}" for name in sets)])
    return (
        f"{aligned(rows)}\n\nCosines are those to the vectors before the export, of {record['texts']} texts. "
        "Columns with a set's name hold nDCG@10."
    )


def main() -> None:
    """Export a model, check it, and print what was measured."""
    args = parse_arguments()
    require_extra(args.format)
    output_dir = args.output_dir or f"{args.model.rstrip('/')}-{args.format}"
    inputs = {name: value for name, value in vars(args).items() if name in ("model", "teacher") and value}
    settings = {name: value for name, value in vars(args).items() if name not in inputs}
    run = begin("export", output_dir, settings, inputs, args.overwrite, resumable=False)
    if run is None:
        return
    sets = load_evaluation_sets("--datasets", args.datasets)
    model = load_sentence_transformer("model", args.model, "cpu", args.trust_remote_code)
    require_finite(model, f"model {args.model}")
    teacher = joined = None
    if args.teacher is not None:
        teacher = load_sentence_transformer("--teacher", args.teacher, "cpu", args.trust_remote_code)
        joined = join(model, teacher)
    run.start()
    try:
        if teacher is not None and joined is not None:
            save_embedding_model(joined, run.folder)
            record = check_router(model, teacher, run.folder, sets)
        else:
            record = check(model, export(model, run.folder, args.format, args.dtypes), args.format, sets)
    except UserError:
        shutil.rmtree(run.folder)
        raise
    run.finish(record)
    print(f"\n{format_check(record)}\n")
    logger.info("wrote %s", output_dir)


if __name__ == "__main__":
    run_script(main)
