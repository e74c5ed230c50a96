"""The report's verdict: which rule says what, from accounts as the evaluation writes them."""

import pytest

from modernbert_small.reporting.page import Steps
from modernbert_small.reporting.verdict import cosines_note, mixed_is_better, rising, verdict

MIXED = "student's queries, teacher's documents"


def account(kept=0.92, interval=(0.9, 0.94), ceiling=0.99, mixed=0.91, queries=700):
    """An account of two sets with these shares of the teacher's nDCG@10; a share that is None has no row."""
    shares = {"teacher": 1.0, "teacher, projected": ceiling, "student": kept, MIXED: mixed}
    rows = [
        {
            "system": system,
            "scores": {"A": 0.5 * share, "B": 0.7 * share},
            "mean": 0.6 * share,
            "retention": share,
            "interval": list(interval),
        }
        for system, share in shares.items()
        if share is not None
    ]
    return {"retrieval": rows, "queries": {"A": queries - 1, "B": 1}}


def records(
    of_account, texts=500_000, cosines=(0.80, 0.85, 0.86, 0.861), kinds=("query", "document"), longest=128, epochs=2.0
):
    """The records of phases 1 and 5, as far as a verdict needs them; `cosines`: held out, at equal distances."""
    history = [{"step": 10 * i, "eval_similarity": cosine, "epoch": epochs} for i, cosine in enumerate(cosines, 1)]
    corpus = {"by_source": [{"kind": kind} for kind in kinds], "settings": {"max_seq_length": longest}}
    return {
        "create_dataset": corpus,
        "distil_train": {"account": of_account, "history": history, "rows": {"train": texts}},
    }


def words(found):
    """The sentences of a verdict, and its steps."""
    steps = [step for part in found if isinstance(part, Steps) for step in part.steps]
    return " ".join(part.text for part in found if not isinstance(part, Steps)).replace("\xa0", " "), steps


@pytest.mark.parametrize(
    ("kept", "word"), [(0.97, "Very good"), (0.969, "Good"), (0.9, "Good"), (0.8, "Fair"), (0.3, "Weak")]
)
def test_how_good(kept, word):
    outcomes = {"outcomes": {"better": 20, "worse": 180, "equal": 500}}
    said, _ = words(verdict(records(account(kept) | outcomes)))
    assert said.startswith(
        f"{word}: the student keeps {100 * kept:.1f} % of its teacher’s nDCG@10 on average over 2 sets"
    )
    assert f"({0.6 * kept:.3f} of 0.600)" in said
    assert "For 500 of 700 queries both do equally well, for 20 the student does better, for 180 worse." in said


def test_too_few_queries_to_tell():
    said, steps = words(verdict(records(account(0.83, (0.75, 0.9), queries=60))))
    assert "interval of what is kept is 75.0 % to 90.0 %; it rests on 60 queries." in said
    assert "too few to tell 75 from 90 %; some 500 would narrow" in said  # 60 * (15 / 5) ** 2 = 540
    assert steps[0].startswith("Measure with more queries")
    said, steps = words(verdict(records(account(1.0, (1.0, 1.0), queries=2))))  # of one kind each, so no spread at all
    assert "it rests on 2 queries. That is too few for any judgement" in said
    assert steps[0].startswith("Measure with more queries")
    said, steps = words(verdict(records(account())))
    assert "too few" not in said
    assert not any("more queries" in step for step in steps)


@pytest.mark.parametrize(
    ("kept", "ceiling", "said"),
    [
        (0.92, 0.99, "8.0 % of the teacher’s nDCG@10 are lost: 1.0 % by the projection"),
        (0.92, 0.99, "and 7.0 % by the distillation"),
        (0.92, None, "8.0 % of the teacher’s nDCG@10 are lost, all of it in the distillation"),
        (0.92, 1.01, "are lost: none by the projection to shorter vectors, all of it in the distillation."),
        (0.95, 0.94, "5.0 % of the teacher’s nDCG@10 are lost, by the projection"),
        (1.02, 0.99, "On these sets nothing was lost."),
    ],
)
def test_where_the_rest_was_lost(kept, ceiling, said):
    assert said in words(verdict(records(account(kept, ceiling=ceiling))))[0]


def test_what_to_do_next_by_the_account():
    larger = "If that is not enough, choose a larger student"
    for of_account, others, begins in (
        (account(), {}, [larger]),
        (account(mixed=0.95), {}, ["Today, without any training: embed the documents", larger]),
        (account(ceiling=0.97), {}, ["Raise the ceiling, which is 97.0", larger]),
        (account(), {"kinds": ["document"]}, ["Add queries to the corpus: it holds none", larger]),
        (account(), {"texts": 12_596}, ["Add text and queries like those that will be searched: the stu", larger]),
        (account(), {"longest": 1024}, ["Cut the texts shorter than 1,024 tokens", larger]),
        (
            account(),
            {"cosines": (0.7, 0.8)},
            ["Train for more steps: the training was short, since in its las", larger],
        ),
        (account(), {"cosines": (0.7, 0.8), "texts": 12_596}, ["Train for more steps", "Add text", larger]),
        (
            account(),
            {"epochs": 0.12, "texts": 12_596},
            ["Train for more steps: the training was short, since it", larger],
        ),
        (account(0.98), {}, ["Nothing more is needed"]),
        (account(0.965, ceiling=0.97), {}, ["Raise the ceiling"]),
    ):
        _, steps = words(verdict(records(of_account, **others)))
        assert [step[: len(begin)] for step, begin in zip(steps, begins, strict=True)] == begins


def test_a_comparison_that_failed_or_never_was():
    failed = {"retrieval": [], "failed": "OSError: no space in /home/somebody/deep/down/set"}
    said, steps = words(verdict(records(failed)))
    assert said == "The comparison with the teacher failed: OSError: no space in down/set."
    assert not steps
    assert "was not measured" in words(verdict(records({})))[0]
    assert verdict({"create_dataset": {}}) == []


@pytest.mark.parametrize(
    ("cosines", "rose"),
    [((0.8, 0.82), "0.020"), ((0.8, 0.805), None), ((0.8, 0.9, 0.9, 0.9), None), ((0.9,), None), ((), None)],
)
def test_whether_the_held_out_cosine_still_rose(cosines, rose):
    """The last quarter counts: of four evaluations the last step, of two the whole second half."""
    said = rose and f"the held-out cosine still rose by {rose}"
    assert rising(records({}, cosines=cosines)["distil_train"]) == said


def test_a_short_run_without_evaluations_is_judged_by_its_loss():
    history = [{"step": step, "loss": loss, "epoch": 0.01 * step} for step, loss in ((10, 0.8), (20, 0.5), (30, 0.4))]
    final = records(account(), texts=9000)
    final["distil_train"]["history"] = [*history, {"step": 30, "eval_similarity": 0.6, "epoch": 0.3}]
    assert rising(final["distil_train"]) == "the loss still fell by 20.0\xa0%"
    _, steps = words(verdict(final))
    assert steps[0] == (
        "Train for more steps: the training was short, since it has read only 30.0\xa0% of its texts and in its last "
        "quarter the loss still fell by 20.0\xa0%. Raise max_steps of phase 5, or leave it out."
    )
    assert not any(step.startswith("Add text") for step in steps)
    final["distil_train"]["history"][2]["loss"] = 0.49
    assert rising(final["distil_train"]) is None


def test_the_teachers_documents_are_recommended_only_where_they_win():
    assert mixed_is_better(account(mixed=0.93))
    assert not mixed_is_better(account(mixed=0.92))
    assert not mixed_is_better(account(mixed=None))
    assert not mixed_is_better({"retrieval": []})


def test_thresholds_do_not_carry_over():
    cosines = {"teacher": {"relevant": 0.52, "all": 0.05}, "student": {"relevant": 0.71, "all": 0.18}}
    said = cosines_note({"cosines": cosines})
    assert "higher than the teacher’s: a query and a relevant document have 0.71 on average by the student" in said
    assert "any document 0.18 and 0.05" in said
    assert "does not carry over" in said
    assert "higher than" not in cosines_note({"cosines": {**cosines, "teacher": {"relevant": 0.9, "all": 0.1}}})
    assert "does not carry over" in cosines_note({})
