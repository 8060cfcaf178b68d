import jax
import numpy as np
import pytest
from scripts import imported

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
workloads, _, advice, blockwise = imported("workloads", "training", "advice", "blockwise")

RATES = list(np.geomspace(1e-7, 10, 100))


def test_range_tests_pick_a_rate_where_the_loss_falls():
    steps = np.arange(100)
    losses = list(3 - np.clip(steps - 40, 0, 30) / 10 + np.where(steps > 70, steps - 70.0, 0))
    assert RATES[40] <= advice.steepest(RATES, losses) <= RATES[70]
    assert RATES[40] <= advice.valley(RATES, losses) <= RATES[70]


def test_the_best_of_the_grid_is_a_mean_over_seeds_of_both_files():
    recorded = advice.trained_with([])
    best, loss, second = advice.best_of_grid("denoising", recorded)
    assert np.isclose(loss, np.exp(np.mean([np.log(recorded["denoising", seed, best][-1]) for seed in advice.SEEDS])))
    assert loss < second
    common = {"kind": "train", "workload": "denoising", "peak": 0.001, "validation": [1.0, 0.01]}
    both = advice.trained_with([common | {"seed": seed} for seed in advice.SEEDS])
    assert advice.best_of_grid("denoising", both)[0] == 0.001


def test_the_table_compares_with_the_best_of_the_grid_and_takes_the_start_where_training_diverged():
    best, loss, _ = advice.best_of_grid("denoising", advice.trained_with([]))
    records = []
    for seed, reached in enumerate((loss, 4 * loss, None)):
        common = {"workload": "denoising", "start": 0, "seed": seed}
        records.append({"kind": "suggest", "peak": 0.02, "edge": 0.04, **common})
        records.append({"kind": "train", "workload": "denoising", "seed": seed, "peak": 0.02})
        records[-1]["validation"] = [16 * loss, reached]
    text = advice.table(records, 0)
    assert f"| denoising | {best:g} | 0.02 (4.00) | – | – | – | 0.01 (1.00) |" in text
    assert "**reporting**: within 5 % of the best |  | 0/1 | – |" in text
    assert "0.02 (2.00, 2 seeds)" in advice.table(records[:4], 0)


def test_query_key_and_value_apart_are_the_same_model():
    pytest.importorskip("mlxtend")
    name = "vision transformer"
    whole, apart = workloads.load(name), blockwise.separated(name)
    key = jax.random.key(0)
    params = apart.init(key)
    assert set(jax.tree.leaves(blockwise.GROUPS(params))) == set(blockwise.NAMES)
    assert blockwise.GROUPS(params)["attention_0"] == {
        "norm": "norms",
        "out": "value and output",
        "qk": "query and key",
        "v": "value and output",
    }
    batch = whole.draw(key, whole.train)
    assert np.allclose(apart.loss(params, batch), whole.loss(whole.init(key), batch), rtol=1e-6)


def test_rates_by_kind_keep_the_suggested_level():
    found = {"peak": 0.01, "rates": dict.fromkeys(blockwise.NAMES, 0.04)}
    rates = {method: blockwise.rates_of(found, method, 2.0) for method in blockwise.METHODS}
    assert set(rates[blockwise.ONE].values()) == {0.02}
    assert set(rates[blockwise.BY_KIND].values()) == {0.08}
    assert np.allclose(list(rates[blockwise.HALF].values()), 0.04)
    assert rates[blockwise.PAPER]["feed-forward"] == 0.02
    assert np.isclose(rates[blockwise.PAPER]["norms"], 0.02 / 6)
