r"""Phase 1: build the text corpus that the other phases train on.

In:  MS MARCO, philosophy, NPR and FineWiki from the Hugging Face hub, local copies of them, or your own
     files: tables with columns such as `text`, or `query` and `positive`, and documents (docs/own-data.md).
Out: data/corpus/train-00000-of-000NN.parquet and validation-00000-of-00001.parquet, columns `text`,
     `source`, `kind` (query or document): normalised, at most max_seq_length tokens each, no two equal,
     shuffled; and run.json. With --eval_datasets heldout also heldout/, an evaluation set.

The recipe:      python mlm/create_dataset.py
Own text:        python mlm/create_dataset.py --sources npr notes=/my/notes faq=/my/faq.csv:query=ask,positive=reply
Four processes:  torchrun --nproc_per_node 4 mlm/create_dataset.py
Tiny, no hub:    python mlm/create_dataset.py --sources python_docs --max_rows_per_source 2000 \
                     --validation_rows 200 --tokenizer_name_or_path /my/tokenizer

Sources:
    https://huggingface.co/datasets/sentence-transformers/msmarco-msmarco-MiniLM-L6-v3
    https://huggingface.co/datasets/johnnyboycurtis/Philosophical-Triplets-Retrieval
    https://huggingface.co/datasets/sentence-transformers/npr
    https://huggingface.co/datasets/HuggingFaceFW/finewiki
"""

from modernbert_small.settings.parse import check_command_line, parse_settings

if __name__ == "__main__":
    check_command_line("create_dataset", __doc__)  # before the imports below, which take seconds

import dataclasses
import logging
import shutil
from pathlib import Path

from modernbert_small.corpus.build import SpilledCorpus
from modernbert_small.corpus.decontaminate import Contamination, evaluation_texts
from modernbert_small.corpus.heldout import hold_out, kept_out_texts, require_pairs
from modernbert_small.corpus.sources import Source, is_local, open_sources, source_locations
from modernbert_small.corpus.spill import discard_spill, spill_sources
from modernbert_small.corpus.tally import Tally, format_report, measure
from modernbert_small.corpus.text import Chunker
from modernbert_small.evaluation.own_sets import HELDOUT, set_inputs, write_set
from modernbert_small.evaluation.sets import load_evaluation_sets
from modernbert_small.run.artefacts import begin
from modernbert_small.run.columns import split_mapping
from modernbert_small.run.errors import UserError
from modernbert_small.run.loading import load_tokenizer
from modernbert_small.run.processes import from_first, rank
from modernbert_small.run.script import next_command, run_script
from modernbert_small.run.shards import LEAST_VALIDATION_ROWS
from modernbert_small.run.tables import counted
from modernbert_small.settings.create_dataset import REPORTED_SETS, CreateDatasetArguments

logger = logging.getLogger(__name__)


def texts_to_keep_out(args: CreateDatasetArguments, is_all_local: bool) -> tuple[list[str], list[str]]:
    """The evaluation texts that the corpus must not contain, and the sets' names, without those to be held out.

    The default sets come from the hub. Without the hub they cannot be loaded, which for a corpus of local files is only
    a warning: its model may be reported on other sets.
    """
    if args.decontaminate == "no":
        return [], []
    try:
        retrieval, pairs = load_evaluation_sets("--eval_datasets", named_sets(args))
    except UserError as error:
        if not is_all_local or args.eval_datasets != list(REPORTED_SETS):
            raise
        logger.warning("%s", error)
        logger.warning(
            "no evaluation set is kept out of this corpus: scores on %s will not be trustworthy for a model that is "
            "trained on it; name the sets that you will report on with --eval_datasets",
            " and ".join(REPORTED_SETS),
        )
        return [], []
    texts = evaluation_texts(retrieval, pairs, documents=args.decontaminate == "all")
    return list(texts), [*(dataset.name for dataset in retrieval), *(dataset.name for dataset in pairs)]


def named_sets(args: CreateDatasetArguments) -> list[str]:
    """The evaluation sets that are there before the corpus is."""
    return [name for name in args.eval_datasets if name != HELDOUT]


def make_heldout_set(args: CreateDatasetArguments, sources: list[Source], folder: Path) -> list[str]:
    """Write the set of pairs to hold out, if it is asked for; returns the texts that the corpus must not contain."""
    if HELDOUT not in args.eval_datasets:
        return []
    parts = hold_out(sources, args.max_rows_per_source, args.seed)
    write_set(folder / HELDOUT, HELDOUT, parts)
    queries = counted(len(parts.queries), "query", "queries")
    logger.info("held out: %s; documents to search: %d", queries, len(parts.corpus))
    return list(kept_out_texts(parts))


def divide(corpus: SpilledCorpus, args: CreateDatasetArguments, folder: Path) -> Tally:
    """Write the splits, with a smaller validation split than was asked for if the corpus is small.

    Raises:
        UserError: the corpus has too few texts for any; what was written is removed.
    """
    tally = corpus.write(folder, args.validation_rows)
    texts = tally.rows.total()
    if texts <= 2 * LEAST_VALIDATION_ROWS:
        if rank() == 0:
            shutil.rmtree(folder)
        raise UserError(
            f"--sources {' '.join(args.sources)}: give only {texts} different texts that are not empty or too short; "
            f"expected at least {2 * LEAST_VALIDATION_ROWS + 1}"
        )
    if 2 * args.validation_rows >= texts:
        fewer = max(LEAST_VALIDATION_ROWS, texts // 10)
        logger.warning(
            "validation_rows: %d is half of the corpus's %d texts or more; its validation split has %d texts",
            args.validation_rows,
            texts,
            fewer,
        )
        tally = corpus.write(folder, fewer)
    return tally


def main() -> None:
    """Write each source's cleaned texts to disk; then deduplicate, decontaminate, shuffle and split them all.

    Under torchrun the processes share both passes. What one of them does for all, the others wait for.
    """
    args = parse_settings(CreateDatasetArguments, "create_dataset", __doc__)
    locations = source_locations(args.sources)
    inputs = {
        name: split_mapping("--sources", location).path for name, location in locations.items() if location is not None
    }
    inputs["tokenizer_name_or_path"] = args.tokenizer_name_or_path
    inputs |= set_inputs({name: name for name in named_sets(args)})
    settings = dataclasses.asdict(args)
    run = begin("create_dataset", args.output_dir, settings, inputs, args.overwrite, uses_gpu=False)
    if run is None:
        return
    sources = open_sources(locations, args.strict)
    if HELDOUT in args.eval_datasets:
        require_pairs(sources)
    tokenizer = load_tokenizer("--tokenizer_name_or_path", args.tokenizer_name_or_path, args.trust_remote_code)
    chunker = Chunker(tokenizer, args.max_seq_length)
    texts, kept_out = from_first(lambda: texts_to_keep_out(args, all(map(is_local, locations.values()))))
    run.start()
    heldout = from_first(lambda: make_heldout_set(args, sources, run.folder))

    spill = run.folder / "spill"
    counts = spill_sources(sources, spill, chunker, args.max_rows_per_source, args.seed)
    contamination = Contamination([*texts, *heldout]) if texts or heldout else None
    corpus = SpilledCorpus(spill, counts, contamination)
    tally = divide(corpus, args, run.folder)
    if rank() > 0:
        return
    by_source = tally.by_source([source.name for source in sources], chunker)
    measurements = measure(counts, tally, by_source, run.folder)
    kept_out += [HELDOUT] * bool(heldout)
    discard_spill(spill)  # as late as can be: a kill after it begins anew
    record = run.finish(measurements | {"evaluation_sets_kept_out": kept_out})
    print(format_report(record))
    following = next_command("mlm/init_model_mlm.py")
    logger.info("%s is ready in %.0f s; next: %s", run.output_dir, record["wall_seconds"], following)


if __name__ == "__main__":
    run_script(main)
