"""Tables of text."""

from modernbert_small.run.tables import aligned, counted, markdown_table

ROWS = [["source", "kind", "rows"], ["npr", "document", "1,234"], ["own", "query", "7"]]


def test_markdown():
    assert markdown_table(ROWS, (0, 1)) == (
        "| source | kind | rows |\n| --- | --- | ---: |\n| npr | document | 1,234 |\n| own | query | 7 |"
    )


def test_aligned():
    assert aligned(ROWS, (0, 1)) == ("source  kind       rows\nnpr     document  1,234\nown     query         7")


def test_one_thing_is_no_plural():
    assert [counted(n, "text") for n in (0, 1, 1400)] == ["0 texts", "1 text", "1,400 texts"]
    assert [counted(n, "query", "queries") for n in (1, 2)] == ["1 query", "2 queries"]
