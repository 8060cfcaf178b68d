import numpy as np
import pytest
from scripts import imported

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
_, _, advice = imported("workloads", "training", "advice")

RATES = list(np.geomspace(1e-7, 10, 100))


def test_range_tests_pick_a_rate_where_the_loss_falls():
    steps = np.arange(100)
    losses = list(3 - np.clip(steps - 40, 0, 30) / 10 + np.where(steps > 70, steps - 70.0, 0))
    assert RATES[40] <= advice.steepest(RATES, losses) <= RATES[70]
    assert RATES[40] <= advice.valley(RATES, losses) <= RATES[70]


def test_losses_are_known_on_the_grid_and_lie_between_beside_it():
    losses = advice.grid()["denoising"]
    assert np.isclose(advice.interpolated("denoising", 0.01), losses[0.01])
    assert min(losses[0.01], losses[0.1]) <= advice.interpolated("denoising", 0.05) <= max(losses[0.03], losses[0.1])


def test_the_table_compares_with_the_best_of_the_grid_and_marks_what_was_trained():
    common = {"workload": "denoising", "start": 0}
    records = [
        {"kind": "suggest", "peak": 0.02, "edge": 0.01, **common},
        {"kind": "range", **dict.fromkeys(advice.SWEEPS, 0.1), **common},
        {
            "kind": "train",
            "workload": "denoising",
            "peak": 0.02,
            "validation": 2 * min(advice.grid()["denoising"].values()),
        },
    ]
    text = advice.table(records, 0)
    assert "| denoising | 0.03 | 0.02 (2.00*) | 0.01 (1.00) | 0.1 (4.42) | 0.1 (4.42) | 0.01 (1.00) |" in text
    assert "**reporting**: within 5 % of the best |  | 0/1 | 1/1 |" in text
