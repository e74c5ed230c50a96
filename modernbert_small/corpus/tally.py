"""What a corpus holds and what was left out of it, counted for run.json and printed as two tables."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from modernbert_small.corpus.text import Chunker
from modernbert_small.run.content import describe_shards
from modernbert_small.run.tables import aligned

_SAMPLED_TEXTS, _SPARE_TEXTS = 500, 8


class Tally:
    """What some rows of a corpus hold, and what was dropped among them.

    Args:
        parts: of how many tallies, which are added, this is one; so many texts are sampled in each.

    Attributes:
        rows, characters, samples: of each (source, kind); samples are a few texts.
        duplicates, contaminated: texts dropped, by source.
    """

    def __init__(self, parts: int = 1) -> None:
        self.rows: Counter[tuple[str, str]] = Counter()
        self.characters: Counter[tuple[str, str]] = Counter()
        self.samples: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self.duplicates: Counter[str] = Counter()
        self.contaminated: Counter[str] = Counter()
        self._sampled = math.ceil(_SAMPLED_TEXTS / parts) + _SPARE_TEXTS

    def count(self, table: pa.Table) -> pa.Table:
        """Count a table's rows and return it. Rows come in random order, so the first texts are a sample."""
        counted = table.append_column("characters", pc.utf8_length(table["text"]))
        groups = counted.group_by(["source", "kind"]).aggregate([("text", "count"), ("characters", "sum")])
        for group in groups.to_pylist():
            key = (group["source"], group["kind"])
            self.rows[key] += group["text_count"]
            self.characters[key] += group["characters_sum"]
            if (missing := self._sampled - len(self.samples[key])) > 0:
                same = pc.and_(pc.equal(table["source"], key[0]), pc.equal(table["kind"], key[1]))
                self.samples[key] += table["text"].filter(same)[:missing].to_pylist()
        return table

    def __add__(self, other: "Tally") -> "Tally":
        """Both together, with the texts of the first sample first."""
        total = Tally()
        for one in (self, other):
            for name in ("rows", "characters", "duplicates", "contaminated"):
                getattr(total, name).update(getattr(one, name))
            for key, texts in one.samples.items():
                total.samples[key] = (total.samples[key] + texts)[:_SAMPLED_TEXTS]
        return total

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON has it, for `from_json`."""
        keys = [[*key, self.rows[key], self.characters[key], self.samples[key]] for key in self.rows]
        return {"keys": keys, "duplicates": self.duplicates, "contaminated": self.contaminated}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Tally":
        """What `as_json` gave."""
        tally = cls()
        for source, kind, rows, characters, texts in value["keys"]:
            tally.rows[source, kind], tally.characters[source, kind] = rows, characters
            tally.samples[source, kind] = texts
        tally.duplicates.update(value["duplicates"])
        tally.contaminated.update(value["contaminated"])
        return tally

    def by_source(self, names: Sequence[str], chunker: Chunker) -> list[dict[str, Any]]:
        """One entry for each source and kind.

        `tokens` is an estimate, without special tokens: the sample's tokens a character, times all characters.
        """
        entries = []
        for source, kind in sorted(self.rows, key=lambda key: (names.index(key[0]), key[1])):
            sample, characters = self.samples[source, kind], self.characters[source, kind]
            tokens = round(sum(chunker.count(sample)) / sum(map(len, sample)) * characters)
            entry = {"source": source, "kind": kind, "rows": self.rows[source, kind]}
            entries.append({**entry, "characters": characters, "tokens": tokens})
        return entries


def measure(
    counts: Mapping[str, Mapping[str, Any]],
    tally: Tally,
    by_source: list[dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """What run.json says about the corpus.

    Args:
        counts: by source, of `spill.spill_sources`.
        tally: of the whole corpus.
        by_source: of `Tally.by_source`.
        folder: with the finished shards.
    """
    files = describe_shards(folder)
    splits = {
        split: sum(file["rows"] for name, file in files.items() if name.startswith(split))
        for split in ("train", "validation")
    }
    return {
        "rows": splits,
        "tokens": sum(entry["tokens"] for entry in by_source),
        "files": files,
        "by_source": by_source,
        "read": {name: {what: count[what] for what in ("rows", "texts")} for name, count in counts.items()},
        "dropped": {
            name: {
                "empty": count["empty"],
                "too_short": count["too_short"],
                "duplicate": tally.duplicates[name],
                "contaminated": tally.contaminated[name],
            }
            for name, count in counts.items()
        },
        "split": {name: {what: count[what] for what in ("split_texts", "chunks")} for name, count in counts.items()},
        "skipped": {
            name: {"rows": count["skipped"], "first": count["first_skipped"]}
            for name, count in counts.items()
            if count["skipped"]
        },
    }


def format_report(record: Mapping[str, Any]) -> str:
    """Two tables: rows and tokens by source and kind; what was dropped and why."""
    kept = [["source", "kind", "rows", "tokens ≈"]]
    kept += [[e["source"], e["kind"], f"{e['rows']:,}", f"{e['tokens']:,}"] for e in record["by_source"]]
    kept.append(["all", "", f"{sum(record['rows'].values()):,}", f"{record['tokens']:,}"])
    lost = [["source", "rows read", "texts", "empty", "too short", "duplicate", "contaminated", "split", "into chunks"]]
    for name, read in record["read"].items():
        dropped, split = record["dropped"][name], record["split"][name]
        numbers = [read["rows"], read["texts"]]
        numbers += [dropped[why] for why in ("empty", "too_short", "duplicate", "contaminated")]
        numbers += [split["split_texts"], split["chunks"]]
        lost.append([name, *(f"{number:,}" for number in numbers)])
    notes = [
        f"{name}: rows skipped: {skipped['rows']:,}; the first: {skipped['first']}"
        for name, skipped in record["skipped"].items()
    ]
    return "\n".join([aligned(kept, (0, 1)), "", aligned(lost), *notes])
