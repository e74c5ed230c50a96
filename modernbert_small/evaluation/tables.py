"""Accounts and comparisons as tables, for the terminal and the model card."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from modernbert_small.evaluation.systems import TEACHER
from modernbert_small.run.tables import Cells, aligned, counted, printable

_KEPT = (
    "kept: nDCG@10 divided by the teacher's, the mean over the sets, with the 95 % interval of a paired bootstrap over "
    "the queries."
)


def format_account(record: Mapping[str, Any], table: Callable[[Cells], str] = aligned) -> str:
    """An account or a comparison: nDCG@10, sets that were left out, differences, Spearman, MTEB, cost.

    Args:
        record: what `account.account` or `comparison.compare` returned.
        table: how to write a table: `aligned` for a terminal, `markdown_table` for a card.
    """
    blocks = []
    if reason := record.get("failed"):
        blocks.append(f"The comparison with the teacher failed: {reason}")
    if record["retrieval"]:
        blocks += [table(_retrieval_table(record["retrieval"], sum(record.get("queries", {}).values()))), _KEPT]
    if left_out := record.get("left_out"):
        blocks.append(f"Left out, since the teacher's nDCG@10 is 0 there: {', '.join(left_out)}.")
    if differences := record.get("differences"):
        blocks.append(table(_differences_table(differences)))
    for part, title in (("pairs", "Spearman"), ("mteb", "MTEB")):
        if rows := record.get(part):
            names = list(rows[0]["scores"])
            blocks.append(table([[title, *names], *([row["system"], *_scores(row, names)] for row in rows)]))
    if record["cost"]:
        blocks.append(table(_cost_table(record["cost"], record["machine"])))
    return printable("\n\n".join(blocks))


def _retrieval_table(rows: Sequence[Mapping[str, Any]], queries: int) -> Cells:
    """The nDCG@10 of each system on each set and what is kept of the teacher's."""
    names, teacher = list(rows[0]["scores"]), rows[0]["mean"]
    lines = [["nDCG@10", *names, "mean", f"kept (95 %, {counted(queries, 'query', 'queries')})", "ratio of means"]]
    for row in rows:
        low, high = (100 * share for share in row["interval"])
        kept = [f"{100 * row['retention']:.1f} % ({low:.1f} - {high:.1f})", f"{100 * row['mean'] / teacher:.1f} %"]
        mean = f"{row['mean']:.3f}"
        lines.append([row["system"], *_scores(row, names), mean, *(kept if row["system"] != TEACHER else ["", ""])])
    return lines


def _differences_table(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """The differences of students in pairs."""
    lines = [["difference in mean nDCG@10", "", "95 %"]]
    for row in rows:
        low, high = row["interval"]
        pair = f"{row['first']} minus {row['second']}"
        lines.append([pair, f"{row['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}"])
    return lines


def _scores(row: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """A row's scores on these sets, with three decimals."""
    return [f"{row['scores'][name]:.3f}" for name in names]


def _cost_table(costs: Mapping[str, Mapping[str, float]], machine: str) -> Cells:
    """Size and speed of each model, in float32."""
    lines = [[machine, "parameters", "MB", "texts/s", "ms a query"]]
    for name, cost in costs.items():
        size = [f"{cost['parameters'] / 1e6:.1f} M", f"{cost['megabytes']:,.0f}"]
        lines.append([name, *size, f"{cost['texts_per_second']:,.0f}", f"{cost['query_milliseconds']:.1f}"])
    return lines
