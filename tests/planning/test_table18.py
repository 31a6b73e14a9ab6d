"""The report's measurements: what is fitted is found again, what is left out is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cascadevl.model.zoo import config_for
from cascadevl.planning.counts import count
from cascadevl.planning.table18 import (
    FITTED,
    SENT_PER_S,
    TABLE_18,
    Prediction,
    fit,
    predict,
    predictions,
    share_for,
)

MODELS = sorted(FITTED)


@pytest.fixture(scope="module", params=MODELS)
def said(request: pytest.FixtureRequest) -> list[Prediction]:
    return predictions(request.param)


def test_the_table_is_the_reports():
    assert len(TABLE_18) == 18
    assert len({(row.model, row.resolution_px, row.setting) for row in TABLE_18}) == 18
    speedups = {
        row.model: row.requests_per_s
        / next(
            base.requests_per_s
            for base in TABLE_18
            if (base.model, base.resolution_px, base.setting) == (row.model, 896, "Baseline")
        )
        for row in TABLE_18
        if (row.resolution_px, row.setting) == (896, "DvD + ViR")
    }
    assert {round(ratio, 2) for ratio in speedups.values()} == {4.05, 3.47}


def test_rows_above_what_was_sent_are_excluded():
    excluded = {
        (row.model, row.resolution_px, row.setting) for row in TABLE_18 if row.use == "excluded"
    }
    assert excluded == {(model, 448, "DvD + ViR") for model in MODELS}
    assert all(row.requests_per_s <= SENT_PER_S for row in TABLE_18 if row.use != "excluded")


def test_fitted_rows_come_out_as_measured(said: list[Prediction]):
    fitted = [each for each in said if each.row.use == "fitted"]
    assert [each.row.setting for each in fitted] == ["Baseline", "DvD"]
    assert all(abs(each.error) < 0.01 for each in fitted)


def test_the_fit_finds_what_is_written_down():
    model = "InternVL3.5-38B"
    found = fit(model, start=FITTED[model], rounds=1)
    assert found.compute_share == pytest.approx(FITTED[model].compute_share, rel=0.01)
    assert found.num_requests == pytest.approx(FITTED[model].num_requests, rel=0.05)


def test_more_of_the_machine_gives_more_and_more_requests_hide_the_end():
    model = "InternVL3.5-38B"
    counts = count(config_for(model))
    base, decoupled = (row for row in TABLE_18 if row.model == model and row.use == "fitted")
    found = FITTED[model]
    slower = replace(found, compute_share=0.8 * found.compute_share)
    assert predict(base, slower, counts).error < -0.15
    longer = replace(found, num_requests=3 * found.num_requests)
    assert predict(decoupled, longer, counts).error > 0.03


def test_gpus_are_taken_to_reach_what_the_nearest_model_did():
    for model in MODELS:
        assert share_for(count(config_for(model))) == FITTED[model].compute_share
