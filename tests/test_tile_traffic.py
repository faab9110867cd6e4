"""The theorem on a tiled kernel's traffic: its counts by hand, its bound at every size of chip."""

import numpy as np
import pytest

from attnlab.core import masks
from theory import tile_traffic
from theory.tile_traffic import KEY_WIDTH, KEYS, QUERIES, VALUE_WIDTH, bound, count, moved

WIDTH = KEY_WIDTH + VALUE_WIDTH


def test_two_rows_of_tiles_by_hand():
    # 4 queries of width 3 in, 4 outputs of width 2 out; 2 x 3 tiles of 2 keys and values.
    assert count(6, (2, 2), 4, 3, 2) == 4 * 3 + 4 * 2 + 6 * 2 * (3 + 2)


def test_a_kernel_reads_what_its_list_names_and_no_more():
    # Causal, 4 rows of 32: 1 + 2 + 3 + 4 tiles; half of the 256 keys are never asked for.
    entries, live = moved("tiled", (32, 32), masks.Causal())
    assert live == 10
    assert entries == QUERIES * WIDTH + 10 * 32 * WIDTH


def test_the_plain_form_writes_and_reads_its_table_twice():
    entries, live = moved("plain", (32, 32), masks.Full())
    tiled = count(live, (32, 32), QUERIES, KEY_WIDTH, VALUE_WIDTH)
    assert entries - tiled == 4 * QUERIES * KEYS


def test_columns_outside_move_unfinished_outputs_with_their_log_sum_exp():
    entries, live = moved("columns outside", (32, 32), masks.Full())
    assert entries == KEYS * WIDTH + live * 32 * (KEY_WIDTH + 2 * (VALUE_WIDTH + 1))


def test_a_kernel_that_is_wrong_is_not_counted(monkeypatch):
    monkeypatch.setattr(tile_traffic, "_formula", lambda mask, q, k, v: np.zeros((QUERIES, 1)))
    with pytest.raises(ArithmeticError, match="the tiled kernel is off by"):
        moved("tiled", (32, 32), masks.Causal())


@pytest.mark.parametrize("columns", [1, 16, 64])
@pytest.mark.parametrize("room", [4000, 10_000, 100_000, 10_000_000])
def test_the_rows_that_fit_are_the_most_and_stay_within_the_bound(room, columns):
    width, queries, keys = 48, 4096, 8192
    rows = tile_traffic.rows_that_fit(room, columns, 32, 16)
    held = [r * (width + 2) + columns * width + r * columns for r in (rows, rows + 1)]
    assert held[0] <= room < held[1]
    power = min(queries, 2 ** (rows.bit_length() - 1))
    tiles = (queries // power) * (keys // columns)
    moved_here = count(tiles, (power, columns), queries, 32, 16)
    assert moved_here <= bound(room, columns, (queries, keys), (32, 16))


def test_a_chip_too_small_for_a_row_is_refused():
    with pytest.raises(ValueError, match="room: a tile of 64 keys needs 3186 entries, got 3185"):
        tile_traffic.rows_that_fit(3185, 64, 32, 16)
    assert tile_traffic.rows_that_fit(3186, 64, 32, 16) == 1
