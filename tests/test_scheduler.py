import pytest

from dqar.scheduler import eligible_layers


@pytest.mark.parametrize("step, last", [(0, 2), (14, 2), (15, 12), (34, 12), (35, 27), (49, 27)])
def test_slide_8_at_28_layers_and_50_steps(step, last):
    # 14/49 = 0.286 < 0.3 <= 15/49; 34/49 = 0.694 < 0.7 <= 35/49
    assert list(eligible_layers(step, 50, 28, "depth_aware")) == list(range(last + 1))


@pytest.mark.parametrize("step, last", [(2, 2), (3, 12), (6, 12), (7, 27)])
def test_a_progress_of_exactly_three_or_seven_tenths_is_the_next_stage(step, last):
    assert list(eligible_layers(step, 11, 28)) == list(range(last + 1))


@pytest.mark.parametrize("num_layers, expected", [(1, (1, 1, 1)), (12, (1, 6, 12)), (56, (6, 26, 56))])
def test_depth_aware_at_other_depths(num_layers, expected):
    assert tuple(len(eligible_layers(step, 101, num_layers)) for step in (0, 50, 100)) == expected


def test_linear_grows_from_the_first_layer_and_reverse_from_the_last():
    assert [list(eligible_layers(step, 5, 4, "linear")) for step in range(5)] == [
        [],
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]
    assert [list(eligible_layers(s, 5, 4, "linear_reverse")) for s in range(4)] == [[], [3], [2, 3], [1, 2, 3]]


def test_static_computes_every_nth_step():
    assert [len(eligible_layers(step, 7, 3, "static", 3)) for step in range(7)] == [0, 3, 3, 0, 3, 3, 0]


def test_all_and_none_and_a_single_step():
    assert list(eligible_layers(0, 9, 3, "all")) == [0, 1, 2]
    assert list(eligible_layers(8, 9, 3, "none")) == []
    assert len(eligible_layers(0, 1, 28)) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [((0, 5, 4, "spiral"), "'spiral'"), ((5, 5, 4), "step=5"), ((-1, 5, 4), "step=-1"), ((0, 5, 0), "num_layers=0")],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        eligible_layers(*arguments)
