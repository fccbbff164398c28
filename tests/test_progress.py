"""gpt/training/progress.py: the progress of a run, and patience."""

import pytest

from gpt.training.progress import Progress


def test_load_takes_all_values_of_a_checkpoint():
    progress = Progress()
    best = {"step": 3, "val_loss": 1.5}
    state = {"step": 7, "tokens": 50, "best": best, "evaluations_since_best": 2, "skipped": 4}
    progress.load(state, tokens_per_step=10)
    assert progress == Progress(step=7, tokens=50, best=best, evaluations_since_best=2, skipped=4)


def test_load_starts_values_missing_in_an_old_checkpoint_afresh():
    progress = Progress(best={"step": 1, "val_loss": 9.0}, evaluations_since_best=5, skipped=6)
    progress.load({"step": 7}, tokens_per_step=10)
    assert progress == Progress(step=7, tokens=70)


def test_only_a_lower_loss_is_the_best():
    progress = Progress(evaluation_due=True)
    seen = []
    for step, loss in enumerate((2.0, 3.0, 2.0, 1.5, float("nan"))):
        progress.step = step
        seen.append((progress.evaluated(loss), progress.evaluations_since_best, progress.best["step"]))
    assert seen == [(True, 0, 0), (False, 1, 0), (False, 2, 0), (True, 0, 3), (False, 1, 3)]
    assert progress.best == {"step": 3, "val_loss": 1.5} and not progress.evaluation_due


@pytest.mark.parametrize(
    ("patience", "since", "ends"),
    [(0, 0, False), (0, 9, False), (1, 0, False), (2, 1, False), (2, 2, True), (2, 3, True)],
)
def test_patience_counts_evaluations(patience, since, ends):
    assert Progress(evaluations_since_best=since).without_progress(patience) is ends


def test_the_patience_note_names_the_best_step():
    progress = Progress(step=9, best={"step": 3, "val_loss": 1.23456}, evaluations_since_best=2)
    assert progress.patience_note() == "step 9: 2 evaluations gave no lower validation loss than 1.2346 of step 3"
    assert Progress(step=9, evaluations_since_best=2).patience_note().endswith("than infinity")
