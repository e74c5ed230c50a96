"""Tables of text."""

from modernbert_small.run.tables import aligned, markdown_table

ROWS = [["source", "kind", "rows"], ["npr", "document", "1,234"], ["own", "query", "7"]]


def test_markdown():
    assert markdown_table(ROWS, (0, 1)) == (
        "| source | kind | rows |\n| --- | --- | ---: |\n| npr | document | 1,234 |\n| own | query | 7 |"
    )


def test_aligned():
    assert aligned(ROWS, (0, 1)) == ("source  kind       rows\nnpr     document  1,234\nown     query         7")
